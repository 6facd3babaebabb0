// Package arch holds the house together: who may import whom, what packages and files look like and
// how large they are, that starting costs nothing, and that the documents say what the code does.
// The rules are data: who imports whom in rules_test.go, where an edge that is needed and not there
// goes in with the reason beside it, and sizes in measures_test.go.
package arch
