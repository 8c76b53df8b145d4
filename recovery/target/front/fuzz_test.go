package front

import (
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// FuzzHostile gives a front whatever can come from connections, and more: any
// operation, client, generation, session, slot, number and flag in any order,
// with connections that close, crashes, evictions, aborts and time between. Every
// request gets one answer, replays are executed in order, and the front ends.
func FuzzHostile(f *testing.F) {
	f.Add([]byte("\x00\x01\x01\x01\x01\x00\x00\x00\x02\x01\x25\x01\x01\x00\x00\x00"))
	seed := []byte{}
	for i := range byte(200) {
		seed = append(seed, i%11, i/3, i*7, i%2, i%3, i*5, i%4, i*13)
	}
	f.Add(seed)
	ops := []wire.Op{
		wire.OpConnect, wire.OpDisconnect, wire.OpPing, wire.OpGetattr, wire.OpMkdir, wire.OpMkdir, wire.OpMkdir, wire.OpSyncTarget,
		wire.OpSetVIPEpoch, wire.OpOSTFetch, wire.OpLock, wire.OpTouchAtime, wire.OpFence, wire.Op(9999),
	}
	flags := []wire.Flags{0, wire.FlagReplay, wire.FlagReplay, wire.FlagLastReplay, wire.FlagResend, wire.FlagWaitCommit, 0xffff}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 4000 {
			return
		}
		synctest.Test(t, func(t *testing.T) {
			r := &rig{t: t, d: &disk{}, cfg: cfg}
			r.start()
			var conns []wire.Target
			for ; len(in) >= 8; in = in[8:] {
				a, b := in[0], in[1:8]
				switch {
				case a%11 == 0 || len(conns) == 0:
					c := r.accept(wire.Peer{Node: string('a' + rune(b[0]%2)), Session: uint64(b[1] % 6), Local: b[2]%4 == 0})
					conns = append(conns, c)
				case a%31 == 1:
					conns[int(b[0])%len(conns)].(io.Closer).Close()
				case a%61 == 2:
					r.crash()
					conns = nil
				case a%61 == 3:
					r.f.Evict(wire.ClientID{b[0] % 3})
				case a%61 == 4:
					r.f.Abort()
				case a%31 == 5:
					r.b.commit(int(b[0]))
				case a%31 == 6:
					time.Sleep(time.Duration(b[0]) * time.Second / 4)
				default:
					q := wire.Request{Cookie: uint64(b[5] % 3), Name: []byte{'o', '0' + b[5]%3}}
					q.Op, q.Flags = ops[int(b[1])%len(ops)], flags[int(b[2])%len(flags)]
					q.Client, q.ClientGen, q.Slot, q.XID = wire.ClientID{b[3] % 3}, uint64(b[3]/3%3), uint16(b[4]%10), uint64(b[4]/10)
					q.Transno = uint64(b[6])
					if b[5]%16 == 0 {
						q.VIP, q.VIPEpoch = 1, uint64(b[6]%4)
						q.Transno <<= 50
					}
					if q.Op == wire.OpConnect {
						q.Transno *= 10
					}
					r.send(conns[int(b[0])%len(conns)], q)
				}
			}
			r.end()
		})
	})
}
