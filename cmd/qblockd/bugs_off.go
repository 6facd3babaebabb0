//go:build !testpanic

package main

func (d *daemon) bugs() {}
