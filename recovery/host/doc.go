// Package host puts targets together and runs them on a node: ownership of the
// store, the store's engine, the target's body, and recovery in front of it. What
// it returns is served by a transport, or used in the process.
//
// A target's parts are started in this order and stopped in the opposite one; a
// part that fails takes those above it down, and the target stays failed until it
// is stopped and started again, here or on another node.
package host
