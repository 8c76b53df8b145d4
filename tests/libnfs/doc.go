// Package libnfs holds the suite that libnfs's programs (Debian's libnfs-utils)
// run against a server: an NFSv3 client that shares no code with the kernel's.
package libnfs
