// Package kernel holds the suite that a real Linux kernel NFS client runs
// against a server. Its tests need root and BATON_KERNEL=1; BATON_SERVER
// chooses the server ("baton", or "ganesha" to check the suite itself).
// BATON_BIG=1 adds the longest runs.
package kernel
