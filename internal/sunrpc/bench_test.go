package sunrpc

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"testing"
)

// load keeps window calls outstanding on nc until n are answered. It sends one write for all the replies
// that one read brought.
func load(b *testing.B, nc net.Conn, call []byte, n, window int) {
	buf := make([]byte, 256<<10)
	batch := make([]byte, 0, window*len(call))
	for range min(window, n) {
		batch = append(batch, call...)
	}
	sent, got, have := min(window, n), 0, 0
	if _, err := nc.Write(batch); err != nil {
		b.Error(err)
		return
	}
	for got < n {
		k, err := nc.Read(buf[have:])
		if err != nil {
			b.Error(err)
			return
		}
		have += k
		at, replies := 0, 0
		for have-at >= 4 {
			l := 4 + int(binary.BigEndian.Uint32(buf[at:])&(1<<31-1))
			if have-at < l {
				break
			}
			at += l
			replies++
		}
		copy(buf, buf[at:have])
		have -= at
		got += replies
		if more := min(replies, n-sent); more > 0 {
			if _, err := nc.Write(batch[:more*len(call)]); err != nil {
				b.Error(err)
				return
			}
			sent += more
		}
	}
}

func cpu() float64 {
	var ru syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &ru)
	return float64(ru.Utime.Nano() + ru.Stime.Nano())
}

// BenchmarkCalls: a call of GETATTR's size (AUTH_SYS, a 48-byte handle) echoed, inline and on a worker.
func BenchmarkCalls(b *testing.B) {
	for _, tc := range []struct {
		name string
		proc uint32
	}{{"null", 0}, {"inline", procEcho}, {"worker", procEchoGo}} {
		for _, load_ := range []struct{ conns, window int }{{1, 1}, {1, 32}, {4, 16}} {
			b.Run(fmt.Sprintf("%s/%dx%d", tc.name, load_.conns, load_.window), func(b *testing.B) {
				_, a := startServer(b, Config{Logger: slog.New(slog.DiscardHandler)}, newTestHandler())
				cr := Cred{Flavor: AuthSys, NGIDs: 8}
				msg := append(words(1, 0, 2, testProg, 3, tc.proc), appendCred(nil, &cr)...)
				call := record(append(msg, make([]byte, 84)...))
				var ncs []net.Conn
				for range load_.conns {
					ncs = append(ncs, dialRaw(b, a))
				}
				b.ReportAllocs()
				b.ResetTimer()
				c0 := cpu()
				var wg sync.WaitGroup
				for _, nc := range ncs {
					wg.Go(func() { load(b, nc, call, max(1, b.N/load_.conns), load_.window) })
				}
				wg.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
				b.ReportMetric((cpu()-c0)/float64(b.N), "cpu-ns/op")
			})
		}
	}
}

// BenchmarkPayload: 1 MiB in (as WRITE) and out (as READ), eight outstanding.
func BenchmarkPayload(b *testing.B) {
	const window = 8
	run := func(b *testing.B, call []byte, out int) {
		_, a := startServer(b, Config{Logger: slog.New(slog.DiscardHandler)}, newTestHandler())
		nc := dialRaw(b, a)
		b.SetBytes(MaxPayload)
		b.ReportAllocs()
		b.ResetTimer()
		slots := make(chan struct{}, window)
		go func() {
			for range b.N {
				slots <- struct{}{}
				if _, err := nc.Write(call); err != nil {
					b.Error(err)
					return
				}
			}
		}()
		r := bufio.NewReaderSize(nc, 256<<10)
		buf := make([]byte, 256<<10)
		for range b.N {
			for left := out; left > 0; {
				n, err := io.ReadFull(r, buf[:min(left, len(buf))])
				if err != nil {
					b.Fatal(err)
				}
				left -= n
			}
			<-slots
		}
		b.ReportMetric(float64(b.N)*MaxPayload/b.Elapsed().Seconds()/1e9, "GB/s")
	}
	b.Run("in", func(b *testing.B) {
		run(b, record(callMsg(1, procSink, make([]byte, MaxPayload)...)), 4+24+4)
	})
	b.Run("out-inline", func(b *testing.B) {
		run(b, record(callMsg(1, procRead, words(MaxPayload)...)), 4+24+4+MaxPayload)
	})
	b.Run("out-worker", func(b *testing.B) {
		run(b, record(callMsg(1, procReadGo, words(MaxPayload)...)), 4+24+4+MaxPayload)
	})
}
