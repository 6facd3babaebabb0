//go:build race

package tlspsk

const race = true
