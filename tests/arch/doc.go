// Package arch holds the house together: who may import whom, what every package and file has to look like,
// that starting costs nothing, and that the documents say what the code does. The rules are data in
// rules.go; an edge that is needed and not there goes in with the reason beside it.
package arch
