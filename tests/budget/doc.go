// Package budget opens images whose numbers are out of all proportion on a real daemon whose
// address space is limited, uses them as a client would, and requires that the daemon took no more
// memory than docs/limits.md says, and that it goes on.
package budget
