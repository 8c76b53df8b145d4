// Package lockmsg holds the messages between the lock suite and its helper
// processes in the guests: one JSON object a line, each way.
package lockmsg

// AgentPort is the TCP port of a guest's agent. Each connection starts with one
// line, a JSON array with a program and its arguments, and then is that
// program's standard input and output. "work" as the program is the helper
// itself, "quit" alone ends the agent.
const AgentPort = 7010

// Lock types of Request and Reply.
const (
	Read   = "R"
	Write  = "W"
	Unlock = "U"
)

// Operations of an owner process. Replies come in the order in which the
// operations end.
const (
	// OpOpen opens (and if need be creates) the file Name; Reply.N is its number
	// for Request.File.
	OpOpen = "open"
	// OpClose closes File.
	OpClose = "close"
	// OpLock is F_SETLK, or F_SETLKW with Wait.
	OpLock = "lock"
	// OpTest is F_GETLK.
	OpTest = "test"
	// OpFlock is flock(2), without LOCK_NB with Wait.
	OpFlock = "flock"
	// OpClock returns the guest's monotonic clock in Reply.N (ns).
	OpClock = "clock"
	// OpPingPong takes and gives back the lock on byte 0 N times, keeping it
	// HoldNs each time; Reply.Times are pairs: when it came, and when it was given
	// back (ns of OpClock's clock, taken before the call).
	OpPingPong = "pingpong"
	// OpProbe tries to get the ranges Start+i*Step, Len bytes each, i < N, again
	// and again until OpStop; Reply.N is the number of tries, Reply.Times
	// are the i of tries that succeeded and should not have.
	OpProbe = "probe"
	// OpCount increments the number in File under a lock until OpStop, with
	// pauses of up to HoldNs; Reply.N is how often it did. Without Wait it tries
	// until it gets the lock, instead of waiting for it.
	OpCount = "count"
	// OpHold makes the next increment of OpCount take HoldNs between reading and
	// writing; the reply comes when that begins.
	OpHold = "hold"
	// OpProgress returns in Reply.N how far OpProbe or OpCount is.
	OpProgress = "progress"
	// OpStop ends OpProbe and OpCount.
	OpStop = "stop"
)

// Request is one operation of an owner process.
type Request struct {
	ID   int
	Op   string
	Name string `json:",omitempty"`
	File int    `json:",omitempty"`
	// Type, Start and Len are l_type, l_start and l_len (l_whence is SEEK_SET).
	Type       string `json:",omitempty"`
	Start, Len int64
	Wait       bool  `json:",omitempty"`
	N          int   `json:",omitempty"`
	Step       int64 `json:",omitempty"`
	HoldNs     int64 `json:",omitempty"`
}

// Reply is the outcome of the Request with the same ID. The first line of a
// process is a Reply with ID 0 and its PID.
type Reply struct {
	ID int
	// Err is the error's text and Errno its number, "" and 0 for success.
	Err   string `json:",omitempty"`
	Errno int    `json:",omitempty"`
	// Type, Start, Len and Pid are what F_GETLK returned.
	Type       string `json:",omitempty"`
	Start, Len int64
	Pid        int     `json:",omitempty"`
	N          int64   `json:",omitempty"`
	Times      []int64 `json:",omitempty"`
}
