//go:build race

package graph

// raceEnabled: the race detector makes pools lose things.
const raceEnabled = true
