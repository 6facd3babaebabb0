//go:build race

package tlscreds

const raceEnabled = true
