// Package systemd tests the Debian package and its units under a real systemd, which
// is the first process of a container made of the tree of tests/debtree.sh.
package systemd
