package health

import (
	"fmt"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// BenchmarkExchange is what one beat and its answer cost the two nodes together without the
// network: steps, encoding and decoding. Bytes are those of both messages without frames.
func BenchmarkExchange(b *testing.B) {
	for _, targets := range []int{1, 16, 256} {
		b.Run(fmt.Sprintf("targets=%d", targets), func(b *testing.B) {
			var m [2]*Machine
			names := []string{"a", "b"}
			for i, name := range names {
				var err error
				if m[i], err = New(Config{Node: name, Peers: []string{names[1-i]}, Incarnation: 1}); err != nil {
					b.Fatal(err)
				}
				l := Local{VIPs: []VIP{{1, 1}, {2, 1}}, Peers: []string{names[1-i]}}
				for j := range targets {
					l.Targets = append(l.Targets, Target{Name: fmt.Sprintf("%s-ost%03d", name, j), Instance: 1, State: Serving})
				}
				if err := m[i].SetLocal(0, l); err != nil {
					b.Fatal(err)
				}
			}
			var beat Beat
			var buf []byte
			size := 0
			b.ReportAllocs()
			for n := range b.N {
				now := time.Duration(n) * 200 * time.Millisecond
				size = 0
				for i, via := range []Via{Request, Answer} {
					m[i].Beat(names[1-i], &beat)
					buf = beat.Append(buf[:0])
					size += len(buf)
					var got Beat
					if err := DecodeBeat(buf, &got); err != nil {
						b.Fatal(err)
					}
					if !m[1-i].Heard(now, names[i], &got, via) {
						b.Fatal("no news")
					}
					m[1-i].Tick(now, names[i])
					m[1-i].Due(names[i])
				}
			}
			b.ReportMetric(float64(size+wire.RequestHeaderSize+wire.ReplyHeaderSize), "bytes/op")
		})
	}
}
