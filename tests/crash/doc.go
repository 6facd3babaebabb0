// Package crash kills what writes images and looks at what is left: power failures of a file in
// memory that forgets, tears and reorders what was not flushed, and kill -9 of a real daemon under
// load. Every image opens, has no corruption (leaks are allowed, and counted), and shows what was
// acknowledged before an acknowledged flush.
package crash
