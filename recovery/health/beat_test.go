package health

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func randomBeat(r *rand.Rand, targets, vips int) *Beat {
	b := &Beat{
		Incarnation: 1 + r.Uint64N(math.MaxUint64), Seq: 1 + r.Uint64N(math.MaxUint64), Echo: r.Uint64(),
		Interval: time.Duration(r.Uint32()) * time.Millisecond, Want: r.IntN(2) == 0, Round: r.Uint32(),
	}
	for range targets {
		name := make([]byte, 1+r.IntN(MaxTargetName))
		for i := range name {
			name[i] = byte(r.Uint32())
		}
		b.Targets = append(b.Targets, Target{string(name), r.Uint64(), Starting + State(r.IntN(4)), r.Uint32(), r.Uint64()})
	}
	for range vips {
		b.VIPs = append(b.VIPs, VIP{r.Uint32(), r.Uint64()})
	}
	slices.SortFunc(b.Targets, func(a, b Target) int { return strings.Compare(a.Name, b.Name) })
	b.Targets = slices.CompactFunc(b.Targets, func(a, b Target) bool { return a.Name == b.Name })
	slices.SortFunc(b.VIPs, func(a, b VIP) int { return cmp.Compare(a.Index, b.Index) })
	b.VIPs = slices.CompactFunc(b.VIPs, func(a, b VIP) bool { return a.Index == b.Index })
	return b
}

func same(a, b *Beat) bool {
	return a.Incarnation == b.Incarnation && a.Seq == b.Seq && a.Echo == b.Echo && a.Interval == b.Interval && a.Want == b.Want && a.Round == b.Round &&
		len(a.Targets) == len(b.Targets) && len(a.VIPs) == len(b.VIPs) &&
		(len(a.Targets) == 0 || reflect.DeepEqual(a.Targets, b.Targets)) && (len(a.VIPs) == 0 || reflect.DeepEqual(a.VIPs, b.VIPs))
}

func TestBeatRoundTrip(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	var got Beat
	for i := range 500 {
		targets, vips := r.IntN(5), r.IntN(5)
		if i == 0 {
			targets, vips = MaxTargets, MaxVIPs
		}
		b := randomBeat(r, targets, vips)
		if err := b.Check(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		p := b.Append(nil)
		if len(p) > MaxBeatSize {
			t.Fatalf("seed %d: %d bytes, the limit is %d", seed, len(p), MaxBeatSize)
		}
		if err := DecodeBeat(p, &got); err != nil || !same(b, &got) {
			t.Fatalf("seed %d: %v\n%+v\n%+v", seed, err, b, &got)
		}
		// No beginning of a beat is one, nor is a beat with something behind it.
		cut := r.IntN(len(p))
		if err := DecodeBeat(p[:cut], &got); !errors.Is(err, ErrBeat) {
			t.Fatalf("seed %d: %d of %d bytes: %v", seed, cut, len(p), err)
		}
		if err := DecodeBeat(append(p, 0), &got); !errors.Is(err, ErrBeat) {
			t.Fatalf("seed %d: a byte too much: %v", seed, err)
		}
	}
}

func TestBeatLimits(t *testing.T) {
	long := strings.Repeat("x", MaxTargetName+1)
	for name, b := range map[string]*Beat{
		"targets":    {Targets: make([]Target, MaxTargets+1)},
		"addresses":  {VIPs: make([]VIP, MaxVIPs+1)},
		"name":       {Targets: []Target{{Name: long, State: Serving}}},
		"empty name": {Targets: []Target{{State: Serving}}},
		"state":      {Targets: []Target{{Name: "mdt", State: Stopping + 1}}},
		"twice":      {Targets: []Target{{Name: "a", State: Serving}, {Name: "a", State: Serving}}},
		"order":      {Targets: []Target{{Name: "b", State: Serving}, {Name: "a", State: Serving}}},
		"one twice":  {VIPs: []VIP{{1, 1}, {1, 2}}},
		"no state":   {Targets: []Target{{Name: "mdt"}}},
	} {
		if err := b.Check(); !errors.Is(err, ErrBeat) {
			t.Errorf("%s: %v", name, err)
		}
		b.Incarnation, b.Seq = 1, 1
		switch name {
		case "targets":
			for i := range b.Targets {
				b.Targets[i] = Target{Name: fmt.Sprintf("t%05d", i), State: Serving}
			}
		case "addresses":
			for i := range b.VIPs {
				b.VIPs[i].Index = uint32(i)
			}
		}
		var got Beat
		if err := DecodeBeat(b.Append(nil), &got); !errors.Is(err, ErrBeat) {
			t.Errorf("%s: accepted when received: %v", name, err)
		}
		if cap(got.Targets) > 2*MaxTargets || cap(got.VIPs) > 2*MaxVIPs {
			t.Errorf("%s: room for %d targets and %d addresses", name, cap(got.Targets), cap(got.VIPs))
		}
	}
	good := (&Beat{Incarnation: 1, Seq: 1}).Append(nil)
	for _, at := range []int{0, 1, 2, 3, 36, 39} {
		bad := bytes.Clone(good)
		bad[at] |= 0x80
		if err := DecodeBeat(bad, new(Beat)); !errors.Is(err, ErrBeat) {
			t.Errorf("byte %d damaged: %v", at, err)
		}
	}
	for _, b := range []Beat{{Incarnation: 1}, {Seq: 1}} {
		if err := DecodeBeat(b.Append(nil), new(Beat)); !errors.Is(err, ErrBeat) {
			t.Errorf("%+v: %v", b, err)
		}
	}
}

// The encoding is fixed: nodes of different builds talk to each other.
func TestBeatGolden(t *testing.T) {
	b := &Beat{
		Incarnation: 0x0102030405060708, Seq: 9, Echo: 10, Interval: 200 * time.Millisecond, Want: true, Round: 11,
		Targets: []Target{{"mdt", 12, Recovering, 13, 14}, {"ost0", 15, Serving, 16, 17}}, VIPs: []VIP{{18, 19}},
	}
	path := filepath.Join("testdata", "beat.txt")
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.Dump(b.Append(nil)); got != string(want) {
		t.Fatalf("%s differs from\n%s", path, got)
	}
}

func FuzzDecodeBeat(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 8 {
		f.Add(randomBeat(r, r.IntN(3), r.IntN(3)).Append(nil))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		var b, again Beat
		if err := DecodeBeat(p, &b); err != nil {
			if !errors.Is(err, ErrBeat) {
				t.Fatal(err)
			}
			return
		}
		if err := b.Check(); err != nil {
			t.Fatal(err)
		}
		q := b.Append(nil)
		if !bytes.Equal(p, q) {
			t.Fatalf("two encodings of one beat:\n%x\n%x", p, q)
		}
		if err := DecodeBeat(q, &again); err != nil || !same(&b, &again) {
			t.Fatal(err)
		}
	})
}
