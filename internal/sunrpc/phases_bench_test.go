package sunrpc

import (
	"context"
	"testing"
)

// BenchmarkTeardown takes a server with 500 idle connections down quietly.
func BenchmarkTeardown(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		s, a := startServer(b, Config{}, newTestHandler())
		const n = 500
		for range n {
			dialRaw(b, a)
		}
		eventually(b, "all are connected", func() bool { return len(s.Conns()) == n })
		b.StartTimer()
		if q := s.Quiesce(context.Background()); q.Conns != n || q.Left != 0 {
			b.Fatalf("%+v", q)
		}
		if r, err := s.CloseQuietly(context.Background(), repair); r.Orderly != n || err != nil {
			b.Fatalf("%+v, %v", r, err)
		}
	}
}
