// Package statustest has a made-up status for tests of what shows one.
package statustest

import (
	"time"

	"github.com/baton-nfs/baton/internal/status"
)

// Sample returns a made-up status with something in every field, not in
// canonical order.
func Sample() *status.Status {
	return &status.Status{
		Version: "1.2.3", Node: "n1", PID: 4711, Boot: 7,
		Now:    time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC),
		Uptime: 26*time.Hour + 3*time.Minute, DataDir: "/srv/baton", Rpcbind: "own",
		Memory: status.Memory{RSS: 180 << 20, Heap: 90 << 20, InFlight: 3 << 20, Goroutines: 42},
		Targets: []status.Target{
			{Name: "mdt0", Kind: status.KindMDT, State: status.StateUp, Dir: "/srv/baton/mdt", Transno: 1234567, LastCommitted: 1234560,
				Clients: 1, Dirty: 4096, Bytes: 12 << 20, Free: 90 << 30, Files: 20017, LogRecords: 3, Ops: 99000, OpsPerSec: 812.4},
			{Name: "ost1", Kind: status.KindOST, State: status.StateFull, Reason: "less than 64 MiB free", Dir: "/srv/baton/ost1", Transno: 55,
				LastCommitted: 55, Clients: 1, Bytes: 7 << 30, Free: 60 << 20, Files: 812, FlushErrors: 1, Ops: 400},
			{Name: "ost0", Kind: status.KindOST, State: status.StateUp, Dir: "/srv/baton/ost0", Transno: 60, LastCommitted: 58, Clients: 1,
				Dirty: 3 << 20, Bytes: 9 << 30, Free: 90 << 30, Files: 1024, Ops: 500, OpsPerSec: 3.25},
		},
		Peers: []status.Peer{
			{Node: "n2", State: status.PeerAlive, Incarnation: 77, Mine: true, Theirs: true, Silence: 120 * time.Millisecond, Timeout: 800 * time.Millisecond,
				Targets: []status.PeerTarget{{Name: "MDT0000", Instance: 12, State: "serving"}, {Name: "OST0000", Instance: 3, State: "recovering"},
					{Name: "OST0001", Instance: 9, State: "serving", Slow: true}, {Name: "OST0002", Instance: 4, State: "serving", Stale: true}},
				Sent: 9000, Received: 8990, Refused: 1, Suspicions: 3, Wrong: 2, Restarts: 1, Connects: 5, LongestGap: 3200 * time.Millisecond},
			{Node: "n3", State: status.PeerSuspect, Theirs: true, Slow: true, Silence: 93 * time.Second, Timeout: 1600 * time.Millisecond, Sent: 4, Suspicions: 1, Connects: 60},
			{Node: "n4", State: status.PeerIdle, Mine: true},
			{Node: "n5", State: status.PeerIdle},
		},
		Addresses: []status.Address{
			{Addr: "192.0.2.10", Port: 2049, Net: "tcp", Name: "nfs", State: "up", Conns: 3, ConnsTotal: 9, Refused: 1, Calls: 1000000,
				Errors: 2, Malformed: 3, InFlight: 17, BytesIn: 1 << 33, BytesOut: 1 << 34, CallsPerSec: 15321.5,
				BytesInPerSec: 210 << 20, BytesOutPerSec: 1 << 20},
			{Addr: "2001:db8::1", Port: 20048, Net: "udp", Name: "mountd", State: "up", Calls: 4},
		},
		IR:   &status.IR{Connected: true, Imperative: true, Incarnation: 5, Version: 16, State: "partial", Registry: Recovery().Registry},
		VIPs: []status.VIP{{Addr: "192.0.2.10", Index: 1, Epoch: 12, Verifier: "00000000000000c7", VerifierChanges: 1}},
		Locks: []status.LockService{
			{Addr: "2001:db8::1", Index: 2, NSMState: 3, Granted: 4, Hosts: 3, Grace: true, Remaining: 61 * time.Second, HostsReclaimed: 1,
				Forgotten: 17, Notify: status.LockNotify{Total: 3, Notified: 1, Pending: 1, Failed: 1}},
			{Addr: "192.0.2.10", Index: 1, NSMState: 7, Granted: 100000, Unconfirmed: 12, Waiting: 3, Shares: 2, Hosts: 40, Remaining: 42500 * time.Millisecond,
				Notify:    status.LockNotify{Total: 40, Notified: 38, Pending: 2},
				Callbacks: status.LockCallbacks{Sent: 1234, Pending: 1, Accepted: 1230, Refused: 2, Undelivered: 1, MeanMicro: 830.5},
				Calls:     []status.LockCalls{{Outcome: status.LockCallGranted, Calls: 200000}, {Outcome: status.LockCallDenied, Calls: 5}}},
		},
		Exports: []status.Export{
			{Path: "/home", Dir: "/", FSID: "8f3a000000000001", Source: "/etc/baton/exports:3", Clients: []status.ExportClient{
				{Spec: "192.0.2.0/24", Options: "rw,secure,root_squash"}, {Spec: "*", Options: "ro,secure,root_squash"}}},
			{Path: "/a b", Dir: "/sub\ndir", FSID: "7", Clients: []status.ExportClient{{Spec: "host.example", Options: "rw"}}},
		},
		Clients: []status.Client{
			{Addr: "192.0.2.77", Conns: 2, Idle: 4 * time.Second, Calls: 999, BytesIn: 5, BytesOut: 6, CallsPerSec: 12, Mounts: []string{"/home", "/evil\x1b[2J"}},
			{Addr: "192.0.2.78", Conns: 1, Idle: time.Hour, Calls: 1},
			{Addr: "192.0.2.79"},
		},
		Procs: []status.Proc{
			{Program: "nfs3", Name: "GETATTR", Calls: 900000, Time: 9 * time.Second, PerSec: 15000, MeanMicro: 10},
			{Program: "nfs3", Name: "CREATE", Calls: 1000, Errors: 5, Replayed: 2, Time: 2 * time.Second, MeanMicro: 2000},
			{Program: "mount3", Name: "MNT", Calls: 4},
		},
	}
}

// Locks returns entries of a lock table with something in every field.
func Locks() []status.Lock {
	at := time.Date(2030, 1, 2, 3, 0, 0, 0, time.UTC)
	return []status.Lock{
		{ID: 7, FID: "[0x2:0x5:0x0]", Path: "/home/mail box", Kind: status.LockWrite, Start: 0, End: 1<<63 - 1, ToEOF: true, Client: "host7",
			ClientAddr: "192.0.2.77", Svid: 4242, OH: "34323432406e37", Addr: "192.0.2.10", State: "granted", Since: at, Age: 245 * time.Second},
		{ID: 9, FID: "[0x2:0x6:0x0]", Kind: status.LockRead, Start: 100, End: 199, Client: "evil\x1b[2J", ClientAddr: "192.0.2.78", Svid: 1,
			OH: "00ff", Addr: "192.0.2.10", State: "waiting", Since: at.Add(time.Minute), Age: 185 * time.Second},
		{ID: 12, FID: "[0x2:0x6:0x0]", Kind: status.LockShare, Mode: "write", Access: "both", Client: "", ClientAddr: "2001:db8::7", OH: "",
			Addr: "2001:db8::1", State: "unconfirmed", Since: at.Add(2 * time.Minute), Age: 125 * time.Second},
	}
}

// LockHosts returns monitored clients with something in every field.
func LockHosts() []status.LockHost {
	at := time.Date(2030, 1, 1, 3, 0, 0, 0, time.UTC)
	return []status.LockHost{
		{Client: "host7", ClientAddr: "192.0.2.77", Addr: "192.0.2.10", State: 5, NSMState: 7, NotifiedState: 7, Notified: true, Locks: 1500, Since: at, Age: 24 * time.Hour},
		{Client: "host8", ClientAddr: "192.0.2.78", Addr: "192.0.2.10", NSMState: 7, NotifiedState: 5, Since: at.Add(time.Hour), Age: 23 * time.Hour},
	}
}
