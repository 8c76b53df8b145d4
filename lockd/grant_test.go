package lockd

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/baton-nfs/baton/lockd/nlm"
)

// TestCallbackTranscript runs the retry logic over the events of a script:
//
//	run [tries=N] [first=D] [most=D] [again]
//	EVENT...
func TestCallbackTranscript(t *testing.T) {
	datadriven.RunTest(t, "testdata/callback.txt", func(t *testing.T, d *datadriven.TestData) string {
		p := policy{tries: 4, first: 500 * time.Millisecond, most: 30 * time.Second}
		var c callback
		for _, a := range d.CmdArgs {
			var err error
			switch a.Key {
			case "tries":
				_, err = fmt.Sscan(a.Vals[0], &p.tries)
			case "first":
				p.first, err = time.ParseDuration(a.Vals[0])
			case "most":
				p.most, err = time.ParseDuration(a.Vals[0])
			case "again":
				c.maybe = true
			default:
				err = errors.New("unknown argument " + a.Key)
			}
			if err != nil {
				d.Fatalf(t, "%v", err)
			}
		}
		var out strings.Builder
		for _, line := range strings.Fields(d.Input) {
			ev := -1
			for i, n := range eventNames {
				if n == line {
					ev = i
				}
			}
			if ev < 0 {
				d.Fatalf(t, "unknown event %q", line)
			}
			act := c.step(event(ev), &p)
			fmt.Fprintf(&out, "%s -> %v\n", event(ev), act)
			if act.outcome != 0 {
				break
			}
		}
		return out.String()
	})
}

func TestNote(t *testing.T) {
	for _, n := range []note{
		{vers: 4, udp: true, offset: 1 << 40, len: 5, fh: []byte("handle")},
		{vers: 1, fh: bytes.Repeat([]byte{7}, nlm.MaxHandle)},
		{vers: 3, fh: []byte{}},
	} {
		b := n.append(nil)
		got, err := decodeNote(b)
		if err != nil || got.vers != n.vers || got.udp != n.udp || got.offset != n.offset || got.len != n.len || !bytes.Equal(got.fh, n.fh) {
			t.Errorf("%+v: %+v %v", n, got, err)
		}
		if len(b) > 256 {
			t.Errorf("%d bytes", len(b))
		}
	}
	good := (&note{vers: 4, fh: []byte("x")}).append(nil)
	for name, b := range map[string][]byte{
		"empty": nil, "short": good[:noteFixed-1], "format": append([]byte{2}, good[1:]...),
		"version": append([]byte{1, 2}, good[2:]...), "flags": append([]byte{1, 4, 2}, good[3:]...),
		"long": append(good, make([]byte, noteMax)...),
	} {
		if _, err := decodeNote(b); !errors.Is(err, errNote) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzNote(f *testing.F) {
	f.Add((&note{vers: 4, udp: true, offset: 1, len: 2, fh: []byte("handle")}).append(nil))
	f.Add([]byte{1, 2, 3})
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := decodeNote(b)
		if err == nil && !bytes.Equal(n.append(nil), b) {
			t.Fatalf("%x becomes %+v", b, n)
		}
	})
}
