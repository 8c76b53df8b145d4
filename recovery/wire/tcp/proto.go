// Package tcp carries the messages of package wire between nodes: framed TCP,
// with mutual TLS unless it is switched off explicitly.
//
// A connection belongs to one target, one kind of traffic and one session of the
// client, which its handshake names. The client sends request frames, the server reply frames,
// in any order; each frame is a prefix, a message of package wire's encoding
// and bulk bytes. The server grants how many requests may be unanswered; a
// connection that breaks fails what is unanswered and nothing is sent again
// here.
package tcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Versions of the protocol that this package speaks.
const (
	MinVersion = 1
	MaxVersion = 1
)

// Kind is the traffic that a connection is for, so that small requests do not
// wait behind bulk data and signs of life wait behind nothing.
type Kind uint8

// Kinds of connections.
const (
	// Control carries any operation.
	Control Kind = 1
	// Bulk carries any operation; the server grants fewer requests than for
	// Control.
	Bulk Kind = 2
	// Health carries OpPing and OpBeat only, and nothing else carries OpBeat.
	Health Kind = 3
)

// String gives the kind's name.
func (k Kind) String() string {
	switch k {
	case Control:
		return "control"
	case Bulk:
		return "bulk"
	case Health:
		return "health"
	}
	return fmt.Sprintf("kind-%d", uint8(k))
}

// Errors of a handshake, wrapped with what the server says.
var (
	// ErrNoTarget: the server does not have the target; it may be elsewhere.
	ErrNoTarget = errors.New("the node does not serve the target")
	// ErrVersion: the two programs have no protocol version in common.
	ErrVersion = errors.New("no common protocol version")
	// ErrIdentity: the node's name is not that of its certificate, or not the
	// expected one.
	ErrIdentity = errors.New("wrong node")
	// ErrBusy: the server has too many connections or is stopping.
	ErrBusy = errors.New("the node takes no more connections")
	// ErrRefused: the server refuses the connection for another reason.
	ErrRefused = errors.New("connection refused by the node")
)

// Errors of a connection.
var (
	// ErrClosed: the connection was closed by its owner.
	ErrClosed = wire.ErrClosed
	// ErrPeer: the other side broke the protocol.
	ErrPeer = errors.New("protocol violation")
	// ErrTimeout: the other side is silent or does not take data.
	ErrTimeout = errors.New("peer does not respond")
	// ErrGoAway: the server stops or no longer has the target.
	ErrGoAway = errors.New("the target is leaving the node")
)

// Handshake codes and the errors they stand for.
const (
	codeOK uint16 = iota
	codeNoTarget
	codeVersion
	codeIdentity
	codeBusy
	codeRefused
)

var codeErrors = map[uint16]error{
	codeNoTarget: ErrNoTarget, codeVersion: ErrVersion, codeIdentity: ErrIdentity, codeBusy: ErrBusy, codeRefused: ErrRefused,
}

const (
	helloMagic = 0x42544e57 // "BTNW"
	// maxHello bounds a handshake message in bytes.
	maxHello = 2048
	maxName  = 255
)

// hello is the client's first message.
type hello struct {
	min, max uint16
	kind     Kind
	session  uint64
	node     string
	target   string
}

// welcome is the server's answer.
type welcome struct {
	code    uint16
	version uint16
	window  uint16
	maxBulk uint32
	node    string
	text    string
}

var be = binary.BigEndian

func appendName(b []byte, s string) []byte {
	s = s[:min(len(s), maxName)]
	return append(append(b, byte(len(s))), s...)
}

// seal puts magic and length before a handshake message's body.
func seal(body []byte) []byte {
	b := be.AppendUint32(nil, helloMagic)
	b = be.AppendUint16(b, uint16(len(body)))
	return append(b, body...)
}

func (h *hello) encode() []byte {
	b := be.AppendUint16(nil, h.min)
	b = be.AppendUint16(b, h.max)
	b = append(b, byte(h.kind))
	b = be.AppendUint64(b, h.session)
	return seal(appendName(appendName(b, h.node), h.target))
}

func (w *welcome) encode() []byte {
	b := be.AppendUint16(nil, w.code)
	b = be.AppendUint16(b, w.version)
	b = be.AppendUint16(b, w.window)
	b = be.AppendUint32(b, w.maxBulk)
	return seal(appendName(appendName(b, w.node), w.text))
}

// readHandshake reads a handshake message's body.
func readHandshake(r io.Reader) ([]byte, error) {
	var h [6]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return nil, fmt.Errorf("handshake: %w", err)
	}
	if m := be.Uint32(h[:]); m != helloMagic {
		return nil, fmt.Errorf("%w: handshake begins with %#08x", ErrPeer, m)
	}
	n := int(be.Uint16(h[4:]))
	if n > maxHello {
		return nil, fmt.Errorf("%w: handshake of %d bytes", ErrPeer, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("handshake: %w", err)
	}
	return b, nil
}

var errShort = fmt.Errorf("%w: handshake is too short", ErrPeer)

func takeName(b []byte) (string, []byte, error) {
	if len(b) < 1 || len(b) < 1+int(b[0]) {
		return "", nil, errShort
	}
	n := int(b[0])
	return string(b[1 : 1+n]), b[1+n:], nil
}

// Both decoders accept more bytes than they know: later versions may add some.

func decodeHello(b []byte) (h hello, err error) {
	if len(b) < 13 {
		return h, errShort
	}
	h.min, h.max, h.kind, h.session = be.Uint16(b), be.Uint16(b[2:]), Kind(b[4]), be.Uint64(b[5:])
	if h.node, b, err = takeName(b[13:]); err != nil {
		return h, err
	}
	h.target, _, err = takeName(b)
	return h, err
}

func decodeWelcome(b []byte) (w welcome, err error) {
	if len(b) < 10 {
		return w, errShort
	}
	w.code, w.version, w.window, w.maxBulk = be.Uint16(b), be.Uint16(b[2:]), be.Uint16(b[4:]), be.Uint32(b[6:])
	if w.node, b, err = takeName(b[10:]); err != nil {
		return w, err
	}
	w.text, _, err = takeName(b)
	return w, err
}

// Frame types.
const (
	frameRequest byte = 1
	frameReply   byte = 2
	framePing    byte = 3 // client to server
	framePong    byte = 4
	// frameGoAway: the server reads no more requests; its tag is that of the last
	// request it has read. Replies to those before follow.
	frameGoAway byte = 5
)

// prefixSize is the size of a frame's prefix: type, 0, window granted (replies),
// length of the message, length of the bulk that follows it, tag.
//
// Tags number a connection's requests from 1 in the order they are sent; a
// reply has its request's tag.
const prefixSize = 20

type prefix struct {
	typ    byte
	window uint16
	msg    uint32
	bulk   uint32
	tag    uint64
}

func (p *prefix) append(b []byte) []byte {
	b = append(b, p.typ, 0)
	b = be.AppendUint16(b, p.window)
	b = be.AppendUint32(b, p.msg)
	b = be.AppendUint32(b, p.bulk)
	return be.AppendUint64(b, p.tag)
}

func (p *prefix) decode(b []byte) error {
	p.typ, p.window, p.msg, p.bulk, p.tag = b[0], be.Uint16(b[2:]), be.Uint32(b[4:]), be.Uint32(b[8:]), be.Uint64(b[12:])
	if b[1] != 0 {
		return fmt.Errorf("%w: damaged frame", ErrPeer)
	}
	limit := uint32(0)
	switch p.typ {
	case frameRequest:
		limit = wire.MaxRequestSize
	case frameReply:
		limit = wire.MaxReplySize
	case framePing, framePong, frameGoAway:
		if p.bulk != 0 {
			return fmt.Errorf("%w: bulk in a frame of type %d", ErrPeer, p.typ)
		}
	default:
		return fmt.Errorf("%w: frame of unknown type %d", ErrPeer, p.typ)
	}
	if p.msg > limit || p.bulk > wire.MaxBulk {
		return fmt.Errorf("%w: frame of type %d with %d + %d bytes", ErrPeer, p.typ, p.msg, p.bulk)
	}
	return nil
}

// Timeouts of both sides; zero fields mean the defaults.
type Timeouts struct {
	// Handshake bounds TCP connect, TLS and hello together. Default 10 s.
	Handshake time.Duration
	// Frame is the time from a frame's first byte to its last. Default 30 s.
	Frame time.Duration
	// Write is how long the other side may take no data. Default 30 s.
	Write time.Duration
	// Idle is the silence after which the other side is taken for dead. The
	// client breaks silence by pings, the server tells by itself that it is alive
	// while it does not read. Both sides should use the same. Default 30 s.
	Idle time.Duration
}

func (t *Timeouts) defaults() {
	for p, d := range map[*time.Duration]time.Duration{
		&t.Handshake: 10 * time.Second, &t.Frame: 30 * time.Second, &t.Write: 30 * time.Second, &t.Idle: 30 * time.Second,
	} {
		if *p <= 0 {
			*p = d
		}
	}
}

// tick is how often a connection is looked at for its timeouts.
func (t *Timeouts) tick() time.Duration { return max(min(t.Idle, t.Frame)/8, time.Millisecond) }
