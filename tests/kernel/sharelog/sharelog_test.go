package sharelog

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// some makes operations that follow each other.
func some(t *testing.T, n int) (ops []Op, states [][]byte) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	var b []byte
	var h Head
	for range n {
		o := Op{File: "f", Version: h.Version + 1, Writer: r.IntN(Writers), Kind: []string{Write, Append, Truncate}[r.IntN(3)], Len: 1 + r.Int64N(3000)}
		switch o.Kind {
		case Write, Truncate:
			o.Off = HeadLen + r.Int64N(6000)
		case Append:
			if len(b) == 0 {
				continue
			}
			o.Off = int64(len(b))
		}
		var err error
		if b, err = o.Apply(b, &h); err != nil {
			t.Fatal(err)
		}
		ops, states = append(ops, o), append(states, bytes.Clone(b))
	}
	return ops, states
}

// The contents after every operation are what the head says, and what replaying
// the operations gives.
func TestCheckAndReplay(t *testing.T) {
	ops, states := some(t, 300)
	for i, b := range states {
		h, err := Check(b)
		if err != nil || h.Version != ops[i].Version {
			t.Fatalf("after %+v: %+v, %v", ops[i], h, err)
		}
		if i%50 == 0 {
			again, err := Replay(ops[:i+1], 0)
			if err != nil || !bytes.Equal(again, b) {
				t.Fatalf("replay of %d: %v", i+1, err)
			}
		}
	}
}

// Every way to lose, repeat or mix changes is found.
func TestCheckFinds(t *testing.T) {
	ops, states := some(t, 50)
	b := states[len(states)-1]
	for name, bad := range map[string][]byte{
		"short":          b[:len(b)-1],
		"long":           append(bytes.Clone(b), 0),
		"no head":        b[:HeadLen-1],
		"byte":           flip(b, len(b)-1),
		"head":           flip(b, 10),
		"old head":       append(bytes.Clone(states[20][:HeadLen]), b[HeadLen:]...),
		"old contents":   append(bytes.Clone(b[:HeadLen]), states[20][HeadLen:]...),
		"zeros of a few": make([]byte, 5),
	} {
		if _, err := Check(bad); err == nil {
			t.Errorf("%s: not found", name)
		}
	}
	for name, log := range map[string][]Op{
		"lost":  slices.Delete(slices.Clone(ops), 10, 11),
		"twice": slices.Insert(slices.Clone(ops), 10, ops[10]),
	} {
		if _, err := Replay(log, 0); !errors.Is(err, ErrOrder) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func flip(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 1
	return b
}

func TestDescribe(t *testing.T) {
	var h Head
	b, err := Op{Version: 1, Writer: 1, Kind: Write, Off: HeadLen, Len: 64}.Apply(nil, &h)
	if err == nil {
		b, err = Op{Version: 2, Writer: 2, Kind: Write, Off: HeadLen + 96, Len: 16}.Apply(b, &h)
	}
	if err != nil {
		t.Fatal(err)
	}
	want := "256-319 writer B version 0000001\n320-351 zeros\n352-367 writer C version 0000002\n"
	if got := Describe(b); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	b[270] = 'x'
	if got := Describe(b); !strings.HasPrefix(got, "256-271 mixed or foreign") {
		t.Errorf("got\n%s", got)
	}
}
