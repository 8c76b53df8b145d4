package rpctest

import (
	"bytes"
	"encoding/binary"
	"io"
	"strings"
	"testing"

	"github.com/baton-nfs/baton/internal/xdr"
)

func reply(xid, accepted, stat uint32, result string) []byte {
	b := make([]byte, 28, 28+len(result))
	binary.BigEndian.PutUint32(b, 1<<31|uint32(24+len(result)))
	for i, v := range []uint32{xid, 1, accepted, 0, 0, stat} {
		binary.BigEndian.PutUint32(b[4+4*i:], v)
	}
	return append(b, result...)
}

func TestReply(t *testing.T) {
	var in bytes.Buffer
	in.Write(reply(1, 0, 0, "one"))
	in.Write(reply(2, 1, 0, "")) // another call's
	in.Write(reply(3, 0, 0, "three"))
	if got, err := Reply(&in, 3); err != nil || string(got) != "three" || in.Len() != 0 {
		t.Errorf("%q, %v, %d bytes left", got, err, in.Len())
	}
	if _, err := Reply(&in, 3); err != io.EOF {
		t.Error(err)
	}
	for what, b := range map[string][]byte{"denied": reply(4, 1, 0, ""), "not executed": reply(4, 0, 2, ""), "short": {0x80, 0, 0, 4, 0, 0, 0, 4}} {
		if got, err := Reply(bytes.NewReader(b), 4); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("%s: %q, %v", what, got, err)
		}
	}
	for _, n := range []uint32{0, 3, maxReply + 1} {
		if _, err := Reply(bytes.NewReader(binary.BigEndian.AppendUint32(nil, 1<<31|n)), 4); err == nil {
			t.Errorf("%d bytes are a reply", n)
		}
	}
}

func TestCall(t *testing.T) {
	b := Call(7, 100003, 3, 1, func(w *xdr.Writer) { w.Uint32(9) })
	if len(b) != 68 || binary.BigEndian.Uint32(b) != 1<<31|64 || b[7] != 7 || b[67] != 9 {
		t.Errorf("%x", b)
	}
}
