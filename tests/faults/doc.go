// Package faults lets the i-th I/O of whole scenarios fail, for i = 0, 1, 2, ... until they pass:
// opening, creating, guest requests, resizing, jobs, exports. Each time the error surfaces; the
// graph, its claims and the open files are as before; doing it again works; contents are old or
// new; and the images have no corruption (leaks are counted).
package faults
