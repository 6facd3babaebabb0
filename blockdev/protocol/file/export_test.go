package file

// MustLoop is for tests outside the package.
var MustLoop = mustLoop
