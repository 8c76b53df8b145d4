// Package metrics shows a node's status to Prometheus and answers health
// checks over HTTP.
package metrics

import (
	"strconv"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/prometheus/client_golang/prometheus"
)

// metric is one family and how its samples come out of a status.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	each func(s *status.Status, emit func(v float64, labels ...string))
}

// Collector turns a status into metrics at every scrape.
type Collector struct {
	get     func() status.Status
	metrics []metric
}

// NewCollector returns a collector over get, which is called once a scrape and
// must be safe for concurrent use.
func NewCollector(get func() status.Status) *Collector {
	c := &Collector{get: get}
	add := func(name, help string, kind prometheus.ValueType, labels []string, each func(*status.Status, func(float64, ...string))) {
		c.metrics = append(c.metrics, metric{prometheus.NewDesc("baton_"+name, help, labels, nil), kind, each})
	}
	const gauge, counter = prometheus.GaugeValue, prometheus.CounterValue

	add("info", "Always 1; the labels tell version and node.", gauge, []string{"version", "node"},
		func(s *status.Status, emit func(float64, ...string)) { emit(1, s.Version, s.Node) })
	add("uptime_seconds", "Time since the start.", gauge, nil,
		func(s *status.Status, emit func(float64, ...string)) { emit(s.Uptime.Seconds()) })
	add("boots_total", "Starts of this node on its data.", counter, nil,
		func(s *status.Status, emit func(float64, ...string)) { emit(float64(s.Boot)) })
	add("inflight_bytes", "Requests and replies in memory.", gauge, nil,
		func(s *status.Status, emit func(float64, ...string)) { emit(float64(s.Memory.InFlight)) })
	add("clients", "Client hosts known.", gauge, nil,
		func(s *status.Status, emit func(float64, ...string)) { emit(float64(len(s.Clients))) })
	add("exports", "Exported directories.", gauge, nil,
		func(s *status.Status, emit func(float64, ...string)) { emit(float64(len(s.Exports))) })

	target := func(name, help string, kind prometheus.ValueType, value func(*status.Target) float64) {
		add("target_"+name, help, kind, []string{"target", "kind"}, func(s *status.Status, emit func(float64, ...string)) {
			for i := range s.Targets {
				t := &s.Targets[i]
				emit(value(t), t.Name, t.Kind)
			}
		})
	}
	add("target_state", "1 for the target's state, 0 for the others.", gauge, []string{"target", "kind", "state"},
		func(s *status.Status, emit func(float64, ...string)) {
			for _, t := range s.Targets {
				for _, st := range []string{status.StateUp, status.StateRecovering, status.StateFull, status.StateFailed, status.StateDown,
					status.StateStopped, status.StateStarting, status.StateStopping} {
					v := 0.0
					if t.State == st {
						v = 1
					}
					emit(v, t.Name, t.Kind, st)
				}
			}
		})
	target("transno", "Highest transno given.", counter, func(t *status.Target) float64 { return float64(t.Transno) })
	target("last_committed", "Highest durable transno.", counter, func(t *status.Target) float64 { return float64(t.LastCommitted) })
	target("clients", "Entries of the client table.", gauge, func(t *status.Target) float64 { return float64(t.Clients) })
	target("dirty_bytes", "Bytes not durable yet.", gauge, func(t *status.Target) float64 { return float64(t.Dirty) })
	target("used_bytes", "Bytes used by the target.", gauge, func(t *status.Target) float64 { return float64(t.Bytes) })
	target("free_bytes", "Bytes free in the target's file system.", gauge, func(t *status.Target) float64 { return float64(t.Free) })
	target("files", "Inodes of an MDT, objects of an OST.", gauge, func(t *status.Target) float64 { return float64(t.Files) })
	target("log_records", "Unlink and truncate records not done yet.", gauge, func(t *status.Target) float64 { return float64(t.LogRecords) })
	target("flush_errors_total", "Failed flushes.", counter, func(t *status.Target) float64 { return float64(t.FlushErrors) })
	target("ops_total", "Requests executed.", counter, func(t *status.Target) float64 { return float64(t.Ops) })

	target("recovery_seconds_left", "What is left of the recovery window.", gauge, func(t *status.Target) float64 { return t.WindowLeft.Seconds() })
	target("recovery_clients", "Clients that the last recovery waited for.", gauge, func(t *status.Target) float64 { return float64(t.Known) })
	target("connected_clients", "File system clients that are connected.", gauge, func(t *status.Target) float64 { return float64(t.Connected) })
	target("evictions_total", "Clients that were evicted since the target's start.", counter, func(t *status.Target) float64 { return float64(t.Evicted) })
	target("fences", "Evicted clients of which OSTs are yet to be told.", gauge, func(t *status.Target) float64 { return float64(t.Fences) })
	target("waiting_log_records", "Log records that wait for OSTs which are away.", gauge, func(t *status.Target) float64 { return float64(t.WaitingLogs) })

	ir := func(name, help string, kind prometheus.ValueType, value func(*status.IR) float64) {
		add("ir_"+name, help, kind, nil, func(s *status.Status, emit func(float64, ...string)) {
			if s.IR != nil {
				emit(value(s.IR))
			}
		})
	}
	ir("watching", "1 while the registry's news of targets reach this node.", gauge, func(i *status.IR) float64 { return one(i.Connected) })
	ir("imperative_recovery", "1 if this node acts on the registry's news.", gauge, func(i *status.IR) float64 { return one(i.Imperative) })
	ir("nidtbl_version", "Version of the registry's table of targets that this node has.", gauge, func(i *status.IR) float64 { return float64(i.Version) })
	registry := func(name, help string, kind prometheus.ValueType, value func(*status.RecoveryRegistry) float64) {
		add("ir_registry_"+name, help, kind, nil, func(s *status.Status, emit func(float64, ...string)) {
			if s.IR != nil && s.IR.Registry != nil {
				emit(value(s.IR.Registry))
			}
		})
	}
	registry("incarnation", "Number of the registry's start; of the node that runs it.", gauge, func(r *status.RecoveryRegistry) float64 { return float64(r.Incarnation) })
	registry("nidtbl_version", "Version of the registry's table of targets.", gauge, func(r *status.RecoveryRegistry) float64 { return float64(r.Version) })
	registry("nonir_clients", "Nodes that are not told where targets have started.", gauge, func(r *status.RecoveryRegistry) float64 { return float64(r.NonIR) })
	registry("notify_count_total", "Changes of the table that all who were to be told have acknowledged.", counter, func(r *status.RecoveryRegistry) float64 { return float64(r.NotifyCount) })
	registry("notify_duration_seconds_total", "How long that took, together.", counter, func(r *status.RecoveryRegistry) float64 { return r.NotifyTotal.Seconds() })
	registry("notify_duration_max_seconds", "The longest that it took.", gauge, func(r *status.RecoveryRegistry) float64 { return r.NotifyMax.Seconds() })
	add("ir_registry_state", "1 for the state of imperative recovery, 0 for the others.", gauge, []string{"state"},
		func(s *status.Status, emit func(float64, ...string)) {
			if s.IR != nil && s.IR.Registry != nil {
				for _, st := range []string{"full", "partial", "startup", "disabled"} {
					emit(one(s.IR.Registry.State == st), st)
				}
			}
		})

	importOf := func(name, help string, value func(*status.Import) float64) {
		add("import_"+name, help, gauge, []string{"target"}, func(s *status.Status, emit func(float64, ...string)) {
			for i := range s.Imports {
				emit(value(&s.Imports[i]), s.Imports[i].Target)
			}
		})
	}
	importOf("full", "1 while requests to the target pass.", func(i *status.Import) float64 {
		if i.State == status.ImportFull {
			return 1
		}
		return 0
	})
	importOf("away_seconds", "How long requests to the target have not passed.", func(i *status.Import) float64 { return i.Away.Seconds() })
	importOf("waiting_requests", "Requests that wait for the target or their turn.", func(i *status.Import) float64 { return float64(i.Waiting) })
	importOf("unanswered_requests", "Requests on their way.", func(i *status.Import) float64 { return float64(i.Unanswered) })
	importOf("uncommitted_requests", "Requests kept for replay.", func(i *status.Import) float64 { return float64(i.Uncommitted) })
	importOf("kept_bytes", "Bytes kept for replay.", func(i *status.Import) float64 { return float64(i.Kept) })

	peer := func(name, help string, kind prometheus.ValueType, value func(*status.Peer) float64) {
		add("peer_"+name, help, kind, []string{"node"}, func(s *status.Status, emit func(float64, ...string)) {
			for i := range s.Peers {
				emit(value(&s.Peers[i]), s.Peers[i].Node)
			}
		})
	}
	add("peer_state", "1 for what is thought of the node, 0 for the others.", gauge, []string{"node", "state"},
		func(s *status.Status, emit func(float64, ...string)) {
			for _, p := range s.Peers {
				for _, st := range []string{status.PeerIdle, status.PeerWaiting, status.PeerAlive, status.PeerSuspect} {
					emit(one(p.State == st), p.Node, st)
				}
			}
		})
	peer("silence_seconds", "Time since the last beat of the node; 0 if none is expected.", gauge, func(p *status.Peer) float64 { return p.Silence.Seconds() })
	peer("timeout_seconds", "Silence after which the node is suspected.", gauge, func(p *status.Peer) float64 { return p.Timeout.Seconds() })
	peer("slow", "1 while the node answers beats and does not get on.", gauge, func(p *status.Peer) float64 { return one(p.Slow) })
	peer("slow_targets", "Targets of the node that have work and do not get on.", gauge, func(p *status.Peer) (n float64) {
		for _, t := range p.Targets {
			n += one(t.Slow)
		}
		return n
	})
	peer("beats_sent_total", "Beats sent to the node.", counter, func(p *status.Peer) float64 { return float64(p.Sent) })
	peer("beats_received_total", "Beats received from the node.", counter, func(p *status.Peer) float64 { return float64(p.Received) })
	peer("beats_refused_total", "Beats of the node that were too many or damaged.", counter, func(p *status.Peer) float64 { return float64(p.Refused) })
	peer("suspicions_total", "How often the node was suspected.", counter, func(p *status.Peer) float64 { return float64(p.Suspicions) })
	peer("wrong_suspicions_total", "Suspicions that the node ended by answering again.", counter, func(p *status.Peer) float64 { return float64(p.Wrong) })
	peer("restarts_total", "Restarts of the node that were noticed.", counter, func(p *status.Peer) float64 { return float64(p.Restarts) })
	peer("health_connects_total", "Attempts to connect to the node for beats.", counter, func(p *status.Peer) float64 { return float64(p.Connects) })
	peer("longest_gap_seconds", "The longest time between two beats.", gauge, func(p *status.Peer) float64 { return p.LongestGap.Seconds() })

	addr := func(name, help string, kind prometheus.ValueType, value func(*status.Address) float64) {
		add("rpc_"+name, help, kind, []string{"service", "address", "port", "net"}, func(s *status.Status, emit func(float64, ...string)) {
			for i := range s.Addresses {
				a := &s.Addresses[i]
				emit(value(a), a.Name, a.Addr, strconv.Itoa(a.Port), a.Net)
			}
		})
	}
	addr("connections", "Open connections.", gauge, func(a *status.Address) float64 { return float64(a.Conns) })
	addr("connections_total", "Connections accepted.", counter, func(a *status.Address) float64 { return float64(a.ConnsTotal) })
	addr("refused_total", "Connections over the limit.", counter, func(a *status.Address) float64 { return float64(a.Refused) })
	addr("calls_total", "RPC calls.", counter, func(a *status.Address) float64 { return float64(a.Calls) })
	addr("errors_total", "Calls answered with an RPC error.", counter, func(a *status.Address) float64 { return float64(a.Errors) })
	addr("malformed_total", "Records and datagrams that were no call.", counter, func(a *status.Address) float64 { return float64(a.Malformed) })
	addr("calls_in_flight", "Calls being worked on.", gauge, func(a *status.Address) float64 { return float64(a.InFlight) })
	addr("received_bytes_total", "Bytes received.", counter, func(a *status.Address) float64 { return float64(a.BytesIn) })
	addr("sent_bytes_total", "Bytes sent.", counter, func(a *status.Address) float64 { return float64(a.BytesOut) })

	vip := func(name, help string, kind prometheus.ValueType, value func(*status.VIP) float64) {
		add("vip_"+name, help, kind, []string{"address"}, func(s *status.Status, emit func(float64, ...string)) {
			for i := range s.VIPs {
				emit(value(&s.VIPs[i]), s.VIPs[i].Addr)
			}
		})
	}
	vip("epoch", "The address's epoch.", counter, func(v *status.VIP) float64 { return float64(v.Epoch) })
	vip("verifier_changes_total", "Changes of the write verifier: lost flushes.", counter, func(v *status.VIP) float64 { return float64(v.VerifierChanges) })

	lock := func(name, help string, kind prometheus.ValueType, label string, each func(l *status.LockService, emit func(v float64, value string))) {
		add(name, help, kind, []string{"address", label}, func(s *status.Status, emit func(float64, ...string)) {
			for i := range s.Locks {
				each(&s.Locks[i], func(v float64, value string) { emit(v, s.Locks[i].Addr, value) })
			}
		})
	}
	lock("locks", "Entries of the lock table.", gauge, "state", func(l *status.LockService, emit func(float64, string)) {
		emit(float64(l.Granted), "granted")
		emit(float64(l.Unconfirmed), "unconfirmed")
		emit(float64(l.Waiting), "waiting")
		emit(float64(l.Shares), "share")
	})
	lock("nlm_calls_total", "Calls of the lock manager by their outcome.", counter, "outcome", func(l *status.LockService, emit func(float64, string)) {
		for _, c := range l.Calls {
			emit(float64(c.Calls), c.Outcome)
		}
	})
	lock("nlm_callbacks_total", "GRANTED callbacks by their outcome.", counter, "outcome", func(l *status.LockService, emit func(float64, string)) {
		emit(float64(l.Callbacks.Accepted), "accepted")
		emit(float64(l.Callbacks.Refused), "refused")
		emit(float64(l.Callbacks.Undelivered), "undelivered")
	})
	lock("nsm_notify", "Clients to be told of the last restart.", gauge, "state", func(l *status.LockService, emit func(float64, string)) {
		emit(float64(l.Notify.Notified), "notified")
		emit(float64(l.Notify.Pending), "pending")
		emit(float64(l.Notify.Failed), "failed")
	})
	lockService := func(name, help string, kind prometheus.ValueType, value func(*status.LockService) float64) {
		add(name, help, kind, []string{"address"}, func(s *status.Status, emit func(float64, ...string)) {
			for i := range s.Locks {
				emit(value(&s.Locks[i]), s.Locks[i].Addr)
			}
		})
	}
	lockService("nlm_callbacks_pending", "GRANTED callbacks without an answer yet.", gauge, func(l *status.LockService) float64 { return float64(l.Callbacks.Pending) })
	lockService("nsm_state", "The state number that clients are told; it rises with each restart they hear of.", counter, func(l *status.LockService) float64 { return float64(l.NSMState) })
	lockService("nsm_hosts", "Clients that are told of restarts.", gauge, func(l *status.LockService) float64 { return float64(l.Hosts) })
	lockService("lock_reclaim_seconds", "What is left of the reclaim window or grace period.", gauge, func(l *status.LockService) float64 { return l.Remaining.Seconds() })
	lockService("lock_grace", "1 while only reclaims are granted, because the lock table was lost.", gauge, func(l *status.LockService) float64 {
		if l.Grace {
			return 1
		}
		return 0
	})

	proc := func(name, help string, value func(*status.Proc) float64) {
		add("procedure_"+name, help, counter, []string{"program", "procedure"}, func(s *status.Status, emit func(float64, ...string)) {
			for i := range s.Procs {
				emit(value(&s.Procs[i]), s.Procs[i].Program, s.Procs[i].Name)
			}
		})
	}
	proc("calls_total", "Calls of the procedure.", func(p *status.Proc) float64 { return float64(p.Calls) })
	proc("errors_total", "Replies with a status other than OK.", func(p *status.Proc) float64 { return float64(p.Errors) })
	proc("replayed_total", "Calls answered from a reply record.", func(p *status.Proc) float64 { return float64(p.Replayed) })
	proc("seconds_total", "Time spent in the procedure.", func(p *status.Proc) float64 { return p.Time.Seconds() })
	return c
}

func one(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for i := range c.metrics {
		ch <- c.metrics[i].desc
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	s := c.get()
	for i := range c.metrics {
		m := &c.metrics[i]
		m.each(&s, func(v float64, labels ...string) {
			if x, err := prometheus.NewConstMetric(m.desc, m.kind, v, labels...); err == nil {
				ch <- x
			}
		})
	}
}
