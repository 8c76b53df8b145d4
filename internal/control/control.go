// Package control is the local command channel of a running baton: a unix
// stream socket, mode 0600, that takes one JSON object per line and answers
// each with one JSON object on a line.
//
//	{"v":1,"cmd":"status","args":{}}
//	{"v":1,"result":{...}}
//	{"v":1,"error":"text","code":"failed"}
//
// Only root and the user that baton runs as are served, whatever the mode of
// the socket. Lines, connections and time are bounded.
package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
)

// Version is the protocol's version, sent with every message. A server
// answers other versions with CodeVersion.
const Version = 1

// Commands that a node understands.
const (
	CmdPing    = "ping"    // result: null
	CmdStatus  = "status"  // result: status.Status
	CmdExports = "exports" // result: []status.Export
	CmdReload  = "reload"  // reload the exports; result: []status.Export

	// Commands of package lockctl, which has their arguments and results.
	CmdLocks        = "locks"
	CmdLocksRelease = "locks-release"
	CmdLocksFree    = "locks-free"
	CmdLockHosts    = "lock-hosts"

	// Commands for the targets of a cluster; their argument is a TargetArgs.
	CmdTargets          = "targets" // result: []status.Target
	CmdTargetStart      = "target-start"
	CmdTargetStop       = "target-stop"
	CmdTargetAbort      = "target-abort-recovery"
	CmdTargetEvict      = "target-evict"
	CmdTargetDeactivate = "target-deactivate"
	CmdTargetActivate   = "target-activate"

	CmdRecovery = "recovery" // result: status.Recovery
)

// TargetArgs name a target and what is to be done to it.
type TargetArgs struct {
	Name string `json:"name"`
	// Fenced (CmdTargetStart) is a node that can do nothing to the store any more.
	Fenced string `json:"fenced,omitempty"`
	// Client (CmdTargetEvict) is a node's name, or a client's ID or its beginning.
	Client string `json:"client,omitempty"`
}

// Bounds of messages in bytes.
const (
	maxRequest  = 1 << 20
	maxResponse = 64 << 20
)

// Codes of errors.
const (
	CodeFailed  = "failed"  // the command ran and failed
	CodeUnknown = "unknown" // no such command
	CodeBad     = "bad"     // the request is not understood
	CodeVersion = "version" // another protocol version
	CodeEnding  = "ending"  // the server answers no such commands any more
)

type request struct {
	V    int             `json:"v"`
	Cmd  string          `json:"cmd"`
	Args json.RawMessage `json:"args,omitempty"`
}

type response struct {
	V      int             `json:"v"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  string          `json:"error,omitempty"`
	Code   string          `json:"code,omitempty"`
}

// RemoteError is a command's failure, told by the server.
type RemoteError struct {
	Code string
	Text string
}

// Error gives the server's text.
func (e *RemoteError) Error() string { return e.Text }

// NotRunningError tells that nobody listens on a socket.
type NotRunningError struct {
	Socket string
	Err    error
}

// Error names the data directory's usual place and what to do.
func (e *NotRunningError) Error() string {
	where := e.Socket
	if filepath.Base(e.Socket) == "control.sock" {
		where = filepath.Dir(e.Socket)
	}
	return fmt.Sprintf("no baton is running on %s: start it with \"baton serve\", or name another one with --data, --config or --socket", where)
}

// Unwrap gives the system's error.
func (e *NotRunningError) Unwrap() error { return e.Err }

// ErrInUse means that another process listens on the socket.
var ErrInUse = errors.New("another baton is running on it")
