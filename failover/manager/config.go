package manager

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// Quorum says when a leader may decide.
type Quorum string

// Values of Quorum.
const (
	// Auto is Majority with three nodes and more, and Owner with fewer.
	Auto Quorum = "auto"
	// Majority: more than half of all configured nodes, the leader itself included,
	// have answered the leader within the last Fresh.
	Majority Quorum = "majority"
	// Owner: who has the registry decides alone.
	Owner Quorum = "owner"
)

// Never, as FailbackDelay, leaves addresses where they are as long as they are served
// there.
const Never time.Duration = -1

// Config of a Machine. Node and Nodes are required; zero values mean the defaults,
// but for SlowAfter and FailbackDelay, which DefaultConfig has.
type Config struct {
	// Node is this one; Nodes are all that are configured, this one too.
	Node  string
	Nodes []string
	// Interval is the time between two questions to a node.
	Interval time.Duration
	Quorum   Quorum
	// Confirm is how long a node is suspected before it is dead.
	Confirm time.Duration
	// FailbackDelay is how long a node has to be good before addresses return to it.
	FailbackDelay time.Duration
	// StartTimeout is how long an assigned node may take to listen.
	StartTimeout time.Duration
	// MoveTimeout is how long an address may take to be given up, and to be taken.
	MoveTimeout time.Duration
	// UnreadyAfter is how long a node that lives may be unable to serve.
	UnreadyAfter time.Duration
	// SlowAfter is how long a node may be slow; 0: for ever.
	SlowAfter time.Duration
	// HoldOff is how long an address stays where it is unless there is need. It
	// doubles with every move, up to HoldOffMax, and is as before when the address has
	// stayed for HoldOffMax.
	HoldOff, HoldOffMax time.Duration
	// ParallelMoves bounds the planned moves at a time.
	ParallelMoves int
}

// DefaultConfig has all defaults.
func DefaultConfig(node string, nodes ...string) Config {
	return Config{
		Node: node, Nodes: nodes, Interval: 200 * time.Millisecond, Quorum: Auto, Confirm: 300 * time.Millisecond,
		FailbackDelay: 30 * time.Second, StartTimeout: 5 * time.Second, MoveTimeout: 15 * time.Second, UnreadyAfter: 5 * time.Second,
		HoldOff: 10 * time.Second, HoldOffMax: 10 * time.Minute, ParallelMoves: 4,
	}
}

func (c *Config) prepare() error {
	d := DefaultConfig("")
	for _, x := range []struct {
		p *time.Duration
		d time.Duration
	}{
		{&c.Interval, d.Interval}, {&c.Confirm, d.Confirm}, {&c.StartTimeout, d.StartTimeout}, {&c.MoveTimeout, d.MoveTimeout},
		{&c.UnreadyAfter, d.UnreadyAfter}, {&c.HoldOff, d.HoldOff}, {&c.HoldOffMax, d.HoldOffMax},
	} {
		if *x.p <= 0 {
			*x.p = x.d
		}
	}
	c.HoldOffMax = max(c.HoldOffMax, c.HoldOff)
	if c.ParallelMoves <= 0 {
		c.ParallelMoves = d.ParallelMoves
	}
	switch c.Quorum {
	case "", Auto:
		c.Quorum = Majority
		if len(c.Nodes) < 3 {
			c.Quorum = Owner
		}
	case Majority, Owner:
	default:
		return fmt.Errorf("manager: quorum %q is none", c.Quorum)
	}
	if c.Node == "" || !slices.Contains(c.Nodes, c.Node) {
		return errors.New("manager: the node is not among the nodes")
	}
	return nil
}

// fresh is how old an answer may be that counts as present.
func (c *Config) fresh() time.Duration { return 5 * c.Interval }

// Fresh is how old an answer may be at the default Interval.
const Fresh = time.Second

// settle bounds how long a new leader waits for the first answer of every node.
const settle = 3 * time.Second
