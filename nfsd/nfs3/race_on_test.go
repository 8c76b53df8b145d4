//go:build race

package nfs3

// raceEnabled: sync.Pool drops items at random under the race detector.
const raceEnabled = true
