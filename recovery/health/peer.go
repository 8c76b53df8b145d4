package health

import (
	"math"
	"time"
)

// PeerState is what is thought of a peer.
type PeerState uint8

// States of a peer.
const (
	// StateIdle: nobody is interested, nothing is expected.
	StateIdle PeerState = iota
	// StateWaiting: not heard since the interest began.
	StateWaiting
	StateAlive
	StateSuspect
)

// String gives the state's name.
func (s PeerState) String() string {
	return [...]string{"idle", "waiting", "alive", "suspect"}[s&3]
}

// peer is one peer of a Machine.
type peer struct {
	cfg   *Config
	name  string
	dials bool // this node has the lower name
	state PeerState

	// Interest. open: the peer may not yet know that there is none any more. told is
	// the number of the first beat that told of no interest, 0: none did.
	local, want, open bool
	seq, told         uint64

	// Of the peer's last beat.
	incarnation, lastSeq, echo uint64
	every                      time.Duration
	targets                    []seen // by name
	self                       seen   // the node as a target without a name
	vips                       []VIP

	// Silence. heard is when the last beat came or the interest began; before hintBy
	// and not before grace, if not 0, the peer has to be heard.
	heard         time.Duration
	mean, dev     time.Duration
	sampled       bool
	hintBy, grace time.Duration
	// now is the latest reading of the clock, promised when Tick was to be called, if not 0.
	now, promised time.Duration

	// The connection that this node dials.
	dialing, connected, drop bool
	answered                 bool          // by this connection
	answer                   time.Duration // the last one, or when it was connected
	attempt                  uint64
	nextDial, nextSend       time.Duration
	backoff                  time.Duration
	// ask: this node dials although it has the higher name; it does so from askAt on.
	ask   bool
	askAt time.Duration

	tokens   int
	tokensAt time.Duration
	stats    Stats
}

// Stats counts what happened with a peer.
type Stats struct {
	Sent, Received uint64
	// Late beats came after later ones. Limited ones were too many, Bad ones could not
	// be decoded. Unsent ones had no room on the connection, and Refused ones the
	// peer did not take.
	Late, Limited, Bad, Unsent, Refused uint64
	// Suspicions, and how many of them a beat of the same incarnation ended.
	Suspicions, Wrong uint64
	Restarts          uint64
	Dials, Breaks     uint64
	// Pauses is how often this node was itself late.
	Pauses uint64
	// LongestGap is the longest time between two beats of one incarnation.
	LongestGap time.Duration
}

// interval is the longer one of the two nodes' intervals.
func (p *peer) interval() time.Duration { return max(p.cfg.Interval, p.every) }

func (p *peer) lower() time.Duration { return max(p.cfg.Lower, 4*p.every) }
func (p *peer) upper() time.Duration { return max(p.cfg.Upper, 2*p.lower()) }

// timeout is the silence after which the peer is suspected.
func (p *peer) timeout() time.Duration {
	if p.state == StateWaiting { // a connection has to be made first
		return 2 * p.lower()
	}
	return min(max(p.mean+4*p.dev, p.lower()), p.upper())
}

// sample takes the gap between two beats into the estimate (RFC 6298 section 2).
func (p *peer) sample(gap time.Duration) {
	gap = min(gap, p.upper())
	if !p.sampled {
		p.sampled, p.mean, p.dev = true, gap, gap/2
		return
	}
	off := gap - p.mean
	p.dev += (max(off, -off) - p.dev) / 4
	p.mean += off / 8
}

func (p *peer) judged() bool { return p.state == StateAlive || p.state == StateWaiting }

// deadline is when a peer that is not heard until then is suspected.
func (p *peer) deadline() time.Duration {
	d := p.heard + p.timeout()
	if p.hintBy != 0 {
		d = min(d, p.hintBy)
	}
	return max(d, p.grace)
}

// hint says that the peer may be dead: it has two intervals to deny that.
func (p *peer) hint(now time.Duration) {
	if by := now + 2*p.interval(); p.state == StateAlive && p.hintBy == 0 {
		p.hintBy = by
	}
}

// look notices that this node was not running when it was to: then it cannot judge.
func (p *peer) look(now time.Duration) {
	if p.promised != 0 && now-p.promised > p.lower()/2 {
		p.stats.Pauses++
		p.grace = now + p.lower()
		p.answer = max(p.answer, now)
	}
	p.now, p.promised = now, 0
}

// mute is when a connection without answers is given up.
func (p *peer) mute() time.Duration { return p.answer + 2*p.timeout() }

// due is the earliest time at which Tick has something to do.
func (p *peer) due() (time.Duration, bool) {
	at := time.Duration(math.MaxInt64)
	switch {
	case p.drop:
		return 0, true
	case p.connected:
		at = min(p.nextSend, p.mute())
	case p.holds() && !p.dialing:
		at = p.nextDial
	}
	if p.asks() {
		at = min(at, p.askAt)
	}
	if p.judged() {
		at = min(at, p.deadline())
	}
	return at, at != math.MaxInt64
}

// asks tells whether this node dials at askAt although the peer should.
func (p *peer) asks() bool { return !p.dials && !p.ask && p.state != StateIdle }

// holds tells whether this node is to have a connection to the peer.
func (p *peer) holds() bool { return p.state != StateIdle && (p.dials || p.ask) }

// cut ends the connection or the attempt to get one.
func (p *peer) cut() {
	if p.connected || p.dialing {
		p.connected, p.dialing, p.drop = false, false, true
	}
}

// pauseDial puts the next attempt to connect off.
func (p *peer) pauseDial(now time.Duration) {
	p.nextDial = now + p.backoff
	p.backoff = min(2*p.backoff, max(p.cfg.RedialMax, p.cfg.Interval))
}

// watch begins or ends the exchange of beats.
func (p *peer) watch(now time.Duration) {
	if p.dials && (p.local || p.want) {
		p.open = true
	}
	wanted := p.local || p.want || p.open
	switch {
	case wanted && p.state == StateIdle:
		p.state = StateWaiting
		p.heard, p.hintBy, p.grace = now, 0, 0
		p.nextDial, p.backoff = now, p.cfg.Interval
		p.ask, p.askAt = false, now+3*p.interval()
	case !wanted && p.state != StateIdle:
		p.state = StateIdle
		p.ask = false
		p.cut()
	}
}

// arrived takes the time since the last beat of the same incarnation.
func (p *peer) arrived(now time.Duration) {
	switch {
	case p.state == StateSuspect:
		p.stats.Wrong++
	case p.state != StateAlive:
		return
	}
	if p.grace != 0 { // the gap is this node's
		return
	}
	gap := now - p.heard
	p.stats.LongestGap = max(p.stats.LongestGap, gap)
	p.sample(gap)
}

// newVIPs gives those of a beat's addresses that the peer has not told of, or in another
// epoch. Both lists rise by index.
func (p *peer) newVIPs(told []VIP) (l []VIP) {
	old := p.vips
	for _, v := range told {
		for len(old) > 0 && old[0].Index < v.Index {
			old = old[1:]
		}
		if len(old) == 0 || old[0] != v {
			l = append(l, v)
		}
	}
	return l
}

// hear takes what a beat says about the peer itself.
func (p *peer) hear(now time.Duration, b *Beat, via Via) {
	p.lastSeq, p.echo, p.want = b.Seq, b.Echo, b.Want
	p.every = min(b.Interval, maxInterval)
	p.vips = append(p.vips[:0], b.VIPs...)
	p.heard, p.hintBy, p.grace = now, 0, 0
	switch via {
	case Request:
		p.ask, p.askAt = false, now+3*p.interval()
	case Answer:
		p.answered, p.answer, p.backoff = true, now, p.cfg.Interval
	}
	if !p.local && !p.want && p.told != 0 && p.echo >= p.told {
		p.open = false
	}
}

// Beats received of a peer: burst at once, and then several per interval, this node's or
// the peer's, whichever is shorter, and at the most per shortest.
const (
	burst          = 16
	beatsPerPeriod = 4
	shortest       = 20 * time.Millisecond
)

func (p *peer) allow(now time.Duration) bool {
	step := p.cfg.Interval
	if p.every != 0 {
		step = min(step, max(p.every, shortest))
	}
	step /= beatsPerPeriod
	if n := (now - p.tokensAt) / step; n >= burst {
		p.tokens, p.tokensAt = burst, now
	} else {
		p.tokens, p.tokensAt = min(p.tokens+int(n), burst), p.tokensAt+n*step
	}
	if p.tokens == 0 {
		p.stats.Limited++
		return false
	}
	p.tokens--
	return true
}
