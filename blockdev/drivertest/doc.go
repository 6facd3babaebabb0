// Package drivertest is what tests of drivers, jobs and exports stand on: files in memory
// that are drivers (MemFile), that can lose power (CrashFile) or fail (Fault), helpers to
// build small graphs (NewGraph, AddNode), and a conformance suite that each driver runs (Run).
//
//	mem := drivertest.NewCrashFile(0)
//	flt := drivertest.NewFault(mem)
//	g := drivertest.NewGraph(t)
//	file := drivertest.AddNode(t, g, "file", flt)
//	...                              // put a format on top of file, write through a root
//	img := mem.Crash(seed)           // what a power failure at this moment might leave: a *MemFile
//
// Only tests import it.
package drivertest
