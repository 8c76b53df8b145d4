package mgs

// For the same tests with other storages.
var (
	Script    = script
	Conflicts = conflicts
)
