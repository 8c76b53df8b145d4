package inflight

import (
	"slices"
	"testing"

	"github.com/baton-nfs/baton/recovery/wire"
)

func TestTable(t *testing.T) {
	tb := New[int]()
	k := wire.ReplyKey{XID: 7, Proc: 1, Sum: 9, Port: 700}
	var first, other Entry[int]
	if v := tb.Begin(&first, &k, 1); v != Run || !first.Running() {
		t.Fatal(v)
	}
	for i := range MaxHeld {
		k.Port++ // the same call from another port
		var e Entry[int]
		if v := tb.Begin(&e, &k, 2+i); v != Held || e.Running() {
			t.Fatal(i, v)
		}
	}
	if v := tb.Begin(&other, &k, 9); v != Full {
		t.Fatal(v)
	}
	k2 := k
	k2.Sum++
	if v := tb.Begin(&other, &k2, 10); v != Run || tb.Len() != 2 {
		t.Fatal(v, tb.Len())
	}
	if w := tb.End(&first); !slices.Equal(w, []int{2, 3, 4, 5}) || first.Running() {
		t.Fatal(w)
	}
	if w := tb.End(&first); w != nil {
		t.Fatal("ended twice:", w)
	}
	if v := tb.Begin(&first, &k, 1); v != Run {
		t.Fatal("after the end:", v)
	}
	tb.End(&first)
	tb.End(&other)
	if tb.Len() != 0 {
		t.Fatal(tb.Len())
	}
}
