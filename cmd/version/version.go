// Package version says which version of qblockd and qblockctl this is.
package version

import "runtime/debug"

// Version is that of both programs, and of the package in a monitor's greeting.
const Version = "0.1.0"

// Line is the first line of a program's --version: its name, the version, and the commit that it
// was built from where that is known.
func Line(prog string) string {
	line := prog + " version " + Version
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				line += " (" + s.Value[:12] + ")"
			}
		}
	}
	return line + "\n"
}
