package nfsload

import (
	"bytes"
	"errors"
	"net"
	"testing"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/lockd/nlm"
)

// TestLockCall compares the encoder with a decoder that knows nothing of it.
func TestLockCall(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	c := NewConn(a, ProgNLM)
	l := Lock{Caller: "bench", Handle: []byte("a handle"), Owner: 77, Off: 1 << 40, Len: 9}
	for _, proc := range []uint32{NLMTest, NLMLock, NLMUnlock} {
		c.out = c.out[:0]
		c.LockCall(proc, 0x01020304, &l)
		r := xdr.NewReader(c.out)
		var got nlm.Lock
		var cookie []byte
		var err error
		switch proc {
		case NLMTest:
			var x nlm.TestArgs
			err = x.Decode(r, nlm.Version4)
			got, cookie = x.Lock, x.Cookie
			if !x.Exclusive {
				t.Error("TEST is not exclusive")
			}
		case NLMLock:
			var x nlm.LockArgs
			err = x.Decode(r, nlm.Version4)
			got, cookie = x.Lock, x.Cookie
			if !x.Exclusive || x.Block || x.Reclaim {
				t.Errorf("LOCK is %+v", x)
			}
		case NLMUnlock:
			var x nlm.UnlockArgs
			err = x.Decode(r, nlm.Version4)
			got, cookie = x.Lock, x.Cookie
		}
		if err != nil {
			t.Fatalf("procedure %d: %v", proc, err)
		}
		if string(got.CallerName) != l.Caller || !bytes.Equal(got.FH, l.Handle) || got.Svid != l.Owner || got.Offset != l.Off || got.Len != l.Len || len(got.OH) == 0 || !bytes.Equal(cookie, []byte{1, 2, 3, 4}) {
			t.Errorf("procedure %d: decoded %+v, cookie %x", proc, got, cookie)
		}
	}
	var w xdr.Writer
	nlm.PutRes(&w, []byte{1, 2, 3, 4}, NLMDenied)
	if st, err := LockStat(0x01020304, w.Buf); st != NLMDenied || err != nil {
		t.Errorf("status %d, %v", st, err)
	}
	if _, err := LockStat(0x01020305, w.Buf); !errors.Is(err, ErrProtocol) {
		t.Errorf("another cookie: %v", err)
	}
	if _, err := LockStat(0x01020304, w.Buf[:6]); !errors.Is(err, ErrProtocol) {
		t.Errorf("a short reply: %v", err)
	}
}
