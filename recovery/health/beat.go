package health

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Limits of a beat. One beyond them is neither sent nor accepted.
const (
	// MaxTargets and MaxVIPs bound the lists of a beat.
	MaxTargets = 256
	MaxVIPs    = 1024
	// MaxTargetName bounds a target's name in bytes.
	MaxTargetName = 64
	// MaxBeatSize is the size in bytes of the largest beat.
	MaxBeatSize = beatHeader + 2 + MaxTargets*(targetFixed+MaxTargetName) + 2 + MaxVIPs*vipSize
)

const (
	beatVersion = 1
	beatHeader  = 40
	targetFixed = 22
	vipSize     = 12
)

// A beat fits into the data of a message.
const _ = uint(wire.MaxData - MaxBeatSize)

// ErrBeat is the error, wrapped with details, of every beat that cannot be decoded
// or encoded.
var ErrBeat = errors.New("malformed beat")

// State is what a target does on the node that tells of it.
type State uint8

// States of a target. In Recovering and Serving it takes connections.
const (
	Starting   State = 1
	Recovering State = 2
	Serving    State = 3
	Stopping   State = 4
)

// String gives the state's name.
func (s State) String() string {
	switch s {
	case Starting:
		return "starting"
	case Recovering:
		return "recovering"
	case Serving:
		return "serving"
	case Stopping:
		return "stopping"
	}
	return fmt.Sprintf("state-%d", uint8(s))
}

func (s State) up() bool { return s == Recovering || s == Serving }

// Target is what a beat tells of a target that the node runs.
type Target struct {
	Name string
	// Instance numbers the target's starts; it rises durably.
	Instance uint64
	State    State
	// Work is the number of requests that the target has taken and not answered.
	Work uint32
	// Progress rises whenever the target gets on with its work.
	Progress uint64
}

// VIP is a service address that the node serves.
type VIP struct {
	Index uint32
	Epoch uint64
}

// Beat is one message of a node about itself.
type Beat struct {
	// Incarnation numbers the starts of the node's process.
	Incarnation uint64
	// Seq numbers the beats to this peer, from 1 in every incarnation. Echo is the
	// highest Seq that the node has heard from the peer's present incarnation.
	Seq, Echo uint64
	// Interval is that of the node's beats, in whole milliseconds.
	Interval time.Duration
	// Want: one of the two holds state on the other, as far as the node knows.
	Want bool
	// Round rises whenever the node has looked at itself anew; while it stands
	// still, so does what follows.
	Round uint32
	// Targets rise by name, VIPs by index.
	Targets []Target
	VIPs    []VIP
}

var be = binary.BigEndian

// Check tells whether b can be encoded.
func (b *Beat) Check() error {
	if len(b.Targets) > MaxTargets || len(b.VIPs) > MaxVIPs {
		return fmt.Errorf("%w: %d targets and %d addresses, at most %d and %d fit", ErrBeat, len(b.Targets), len(b.VIPs), MaxTargets, MaxVIPs)
	}
	for i := range b.Targets {
		if err := b.Targets[i].check(); err != nil {
			return err
		}
		if i > 0 && b.Targets[i].Name <= b.Targets[i-1].Name {
			return fmt.Errorf("%w: target %q after %q", ErrBeat, b.Targets[i].Name, b.Targets[i-1].Name)
		}
	}
	for i := 1; i < len(b.VIPs); i++ {
		if b.VIPs[i].Index <= b.VIPs[i-1].Index {
			return fmt.Errorf("%w: address %d after %d", ErrBeat, b.VIPs[i].Index, b.VIPs[i-1].Index)
		}
	}
	return nil
}

func (t *Target) check() error {
	switch {
	case t.Name == "" || len(t.Name) > MaxTargetName:
		return fmt.Errorf("%w: target name of %d bytes", ErrBeat, len(t.Name))
	case t.State < Starting || t.State > Stopping:
		return fmt.Errorf("%w: target in state %d", ErrBeat, t.State)
	}
	return nil
}

// Append appends the encoded beat, which Check accepts, to p. Numbers are
// big-endian: version, flags (bit 0: Want), 2 zero bytes, interval in ms, round (4
// bytes each), incarnation, seq, echo, 4 zero bytes; the number of targets, and of
// each name length and name, state, work, instance, progress; the number of
// addresses, and of each index and epoch.
func (b *Beat) Append(p []byte) []byte {
	want := byte(0)
	if b.Want {
		want = 1
	}
	p = append(p, beatVersion, want, 0, 0)
	p = be.AppendUint32(p, uint32(b.Interval/time.Millisecond))
	p = be.AppendUint32(p, b.Round)
	p = be.AppendUint64(p, b.Incarnation)
	p = be.AppendUint64(p, b.Seq)
	p = be.AppendUint64(p, b.Echo)
	p = be.AppendUint32(p, 0)
	p = be.AppendUint16(p, uint16(len(b.Targets)))
	for i := range b.Targets {
		t := &b.Targets[i]
		p = append(p, byte(len(t.Name)))
		p = append(p, t.Name...)
		p = append(p, byte(t.State))
		p = be.AppendUint32(p, t.Work)
		p = be.AppendUint64(p, t.Instance)
		p = be.AppendUint64(p, t.Progress)
	}
	p = be.AppendUint16(p, uint16(len(b.VIPs)))
	for _, v := range b.VIPs {
		p = be.AppendUint32(p, v.Index)
		p = be.AppendUint64(p, v.Epoch)
	}
	return p
}

// DecodeBeat decodes all of p into b, whose slices are used again. Nothing in b
// aliases p. Errors wrap ErrBeat.
func DecodeBeat(p []byte, b *Beat) error {
	*b = Beat{Targets: b.Targets[:0], VIPs: b.VIPs[:0]}
	switch {
	case len(p) < beatHeader+4 || len(p) > MaxBeatSize:
		return fmt.Errorf("%w: %d bytes", ErrBeat, len(p))
	case p[0] != beatVersion:
		return fmt.Errorf("%w: version %d", ErrBeat, p[0])
	case p[1]&^1 != 0 || be.Uint16(p[2:]) != 0 || be.Uint32(p[36:]) != 0:
		return fmt.Errorf("%w: reserved bits are set", ErrBeat)
	}
	b.Want = p[1] == 1
	b.Interval = time.Duration(be.Uint32(p[4:])) * time.Millisecond
	b.Round = be.Uint32(p[8:])
	b.Incarnation, b.Seq, b.Echo = be.Uint64(p[12:]), be.Uint64(p[20:]), be.Uint64(p[28:])
	if b.Incarnation == 0 || b.Seq == 0 {
		return fmt.Errorf("%w: incarnation %d, number %d", ErrBeat, b.Incarnation, b.Seq)
	}
	n := int(be.Uint16(p[beatHeader:]))
	p = p[beatHeader+2:]
	if n > MaxTargets {
		return fmt.Errorf("%w: %d targets", ErrBeat, n)
	}
	for range n {
		if len(p) < 1 || len(p) < targetFixed+int(p[0]) {
			return fmt.Errorf("%w: it ends in a target", ErrBeat)
		}
		l := int(p[0])
		t := Target{Name: string(p[1 : 1+l])}
		p = p[1+l:]
		t.State, t.Work, t.Instance, t.Progress = State(p[0]), be.Uint32(p[1:]), be.Uint64(p[5:]), be.Uint64(p[13:])
		p = p[targetFixed-1:]
		b.Targets = append(b.Targets, t)
	}
	if len(p) < 2 {
		return fmt.Errorf("%w: it ends before the addresses", ErrBeat)
	}
	n = int(be.Uint16(p))
	p = p[2:]
	if n > MaxVIPs || len(p) != n*vipSize {
		return fmt.Errorf("%w: %d addresses in %d bytes", ErrBeat, n, len(p))
	}
	for ; len(p) > 0; p = p[vipSize:] {
		b.VIPs = append(b.VIPs, VIP{Index: be.Uint32(p), Epoch: be.Uint64(p[4:])})
	}
	return b.Check()
}
