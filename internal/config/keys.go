package config

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"
)

// Key is one documented configuration key.
type Key struct {
	Name    string // full name, "nfs.port"; arrays of tables without index
	Default string // in TOML notation, "" for keys of arrays of tables
	Doc     string // sentences, lines of at most 76 bytes
	Example string // for keys of arrays of tables: a value in TOML notation
}

// sectionDocs introduces the tables.
var sectionDocs = map[string]string{
	"nfs":           "The frontend: where and how NFS 3 and MOUNT 3 are served.",
	"exports":       "What is exported to whom, in a file of its own that is read again on\nSIGHUP and \"baton exportfs -r\".",
	"export":        "Exports given here instead of, or besides, the exports file. One table each.",
	"rpcbind":       "How clients find the ports (rpcbind and portmap).",
	"locks":         "Advisory locks of NFS clients: the lock manager (NLM 1, 3, 4) and the status\nmonitor (NSM 1).",
	"fs":            "Defaults of the file system.",
	"cluster":       "Several nodes that serve one file system. This section, and which nodes run\nwhich target, are the same on all nodes, but for node, listen and start.",
	"registry":      "Where a cluster keeps its registry: service addresses and their owners, the\nnodes' clients. The same on all nodes.",
	"mgs":           "The registry as a target, with registry.kind = \"mgs\".",
	"mdt":           "The metadata target: names, inodes, reply records.",
	"ost":           "The object storage targets, which hold file data. One table each.",
	"recovery":      "How targets, and frontends as their clients, come through failures of each\nother. Of use in a cluster only.",
	"failover":      "How floating addresses are given up and taken by this node. Each stage has a\ndeadline, so that no client can hold a move up.",
	"manager":       "Who decides which node serves a floating address. The same on all nodes; of use\nin a cluster only.",
	"cluster.nodes": "All nodes of the cluster, this one too. One table each.",
	"control":       "The socket that the local commands talk to.",
	"http":          "Metrics for Prometheus at /metrics, a health check at /healthz.",
	"log":           "Messages, written to standard error.",
}

// keyDocs documents every key. A test compares it with the structures.
var keyDocs = map[string]string{
	"node":             "This node's name. Empty: the machine's host name.",
	"data_dir":         "Directory that holds everything whose place is not named below.",
	"cluster_key_file": "The key that signs file handles: 32 random bytes, made at the first start,\nmode 0600. Keep a copy: without it all handles that clients hold become\nstale. Empty: DATA_DIR/cluster.key.",

	"nfs.addresses":        "Service addresses, IPv4 or IPv6, one listener for each. Wildcards are\nrefused: an address must be able to move to another node alone.",
	"nfs.floating":         "Let this node serve floating addresses, too: those that \"baton vip add\"\nenters and that move between nodes. It adds them to the machine and takes\nthem away, which needs root or CAP_NET_ADMIN and CAP_NET_RAW. Only in a\ncluster.",
	"nfs.port":             "Port of NFS, TCP (and UDP if udp is true).",
	"nfs.mount_port":       "Port of MOUNT, TCP and UDP. It may be the same as port.",
	"nfs.udp":              "Serve NFS over UDP, too. Fragmented datagrams can be put together wrongly\non fast networks; leave it off unless an old client needs it.",
	"nfs.max_connections":  "Open TCP connections of one service address. The next one is closed at\nonce.",
	"nfs.conn_inflight":    "Bytes of requests and replies that one connection may have in memory;\nreading from it pauses above.",
	"nfs.inflight":         "The same for all connections of one service address.",
	"nfs.workers":          "Calls that may wait for the disk at the same time. 0: what fits the machine.",
	"nfs.rtmax":            "Largest READ, told to clients by FSINFO. Multiple of 4 KiB, at most 1 MiB.",
	"nfs.rtpref":           "Preferred READ size.",
	"nfs.wtmax":            "Largest WRITE. Multiple of 4 KiB, at most 1 MiB.",
	"nfs.wtpref":           "Preferred WRITE size.",
	"nfs.dtpref":           "Preferred READDIR size.",
	"nfs.drain_timeout":    "How long an orderly stop waits for calls in progress.",
	"nfs.keep_connections": "Whether clients' TCP connections to the addresses above outlive a restart\nby systemd: \"restart\" (they do, if the unit has FileDescriptorStoreMax) or\n\"never\".",

	"exports.file": "File in the syntax of exports(5). Empty: only the [[export]] tables.",

	"export.name":    "Path that clients mount.",
	"export.path":    "Directory inside the file system, \"/\" for all of it.",
	"export.clients": "Hosts, addresses, networks (192.0.2.0/24), or \"*\" for everyone.",
	"export.options": "Options as in exports(5), separated by commas.",

	"rpcbind.mode": "auto: register with the system's rpcbind if one answers on 127.0.0.1:111,\nelse answer as portmap 2 and rpcbind 3 and 4 on the service addresses.\nsystem: always register. own: always answer. off: neither; clients must\nname port= and mountport= when they mount, and nolock, since they find the\nlock manager no other way.",
	"rpcbind.port": "Port to answer on when baton is its own rpcbind. Clients expect 111;\nanother one lets baton run without privileges.",

	"locks.enabled":                "Serve locks. false: clients must mount with nolock.",
	"locks.nlm_port":               "Port of NLM, TCP and UDP. Clients find it through rpcbind; it is fixed so\nthat firewalls can let it through. It may be the same as another port above.",
	"locks.statd_port":             "The same for NSM.",
	"locks.reclaim_window":         "After a start that follows a crash, locks that were held before stay\nreserved for their holders this long. Later they are taken away when\nsomebody else wants the range. Locks that conflict with nothing are given at\nany time.",
	"locks.grace_period":           "Only if the lock table was lost (serve --forget-locks, or damage): how long\nnothing but reclaims is granted. It ends early when all clients are through.",
	"locks.notify_timeout":         "How long a client that does not answer is told again of a restart.",
	"locks.max_total":              "Locks, share reservations and waiting requests of all clients. Above,\nclients get the error \"no locks available\".",
	"locks.max_per_client":         "The same of one client.",
	"locks.max_waiting_per_client": "Waiting requests of one client.",
	"locks.max_hosts":              "Clients that are to be told of restarts.",

	"failover.refuse":         "What becomes of new connections while an address is given up. hold: they\nwait, in the end for the next owner. reset: they are refused, after which\nLinux clients wait 3 s.",
	"failover.close":          "How drained connections end. auto: without a packet, if a node that may be\nnext knows them and can wake their clients up; else, and with half-close,\nby FIN, after which busy clients wait 1 s.",
	"failover.refuse_timeout": "Deadline of stopping new connections.",
	"failover.drain_timeout":  "Deadline of calls in progress and their replies. What is left is cut off,\nand its clients send it again.",
	"failover.commit_timeout": "Deadline of making durable what was acknowledged. If it is missed, the move\ngoes on as after a crash: clients send unstable data again.",
	"failover.close_timeout":  "How long FIN waits for the clients' FIN.",
	"failover.clear_timeout":  "Deadline of destroying what is left of an address's sockets.",
	"failover.remove_timeout": "Deadline of taking the address off the machine.",
	"failover.finish_timeout": "Deadline of closing the rest.",
	"failover.stop_wait":      "How long a node that stops waits for others to take its addresses.",

	"fs.stripe_count": "OSTs that a new file is spread over, 1 to 16.",
	"fs.stripe_size":  "Bytes that go to one OST before the next follows. Multiple of 64 KiB.",
	"fs.durability":   "When a changing operation is answered. disk: when it is durable.",
	"fs.atime":        "relatime: a read updates the access time if it is older than the last\nchange or than a day. off: never.",
	"fs.min_free":     "Keep this much of the file systems under the targets free; writes get\nNFS3ERR_NOSPC before, removals still work.",

	"cluster.node":       "This node's name as in its certificate. Empty: there is one node, which has\neverything in one process, and the other keys here mean nothing.",
	"cluster.listen":     "Address and port where other nodes reach the targets on this node, port 7988\nif none is given. Empty: this node's address in [[cluster.nodes]].",
	"cluster.tls":        "mutual: connections between nodes are encrypted, and both sides show a\ncertificate of the cluster. off: neither; whoever reaches the port can read\nand change everything.",
	"cluster.tls_dir":    "Directory with ca.pem and this node's NODE.pem and NODE.key, as \"baton ca\"\nmakes them.",
	"cluster.start":      "Targets that this node starts by itself: \"MGS\", \"MDT0000\", \"OST0000\" ...\nOne that runs elsewhere stays there. Others run here only after\n\"baton target start\".",
	"cluster.file_locks": "Besides the records of ownership, keep processes off the stores by locks on\nfiles (flock). So a target whose process has died starts again at once.\nfalse: for shared file systems without such locks.",

	"cluster.nodes.name":    "Name of the node, as in its certificate.",
	"cluster.nodes.address": "IP address where other nodes reach its targets, port 7988 if none is given.",

	"registry.kind":             "mgs: in a file, served by the MGS, a target like others. etcd: in an etcd\ncluster that somebody else runs. etcd-embedded: in an etcd cluster whose\nmembers are baton processes. With etcd there is no MGS; one of the nodes is\nelected to tell all where targets run.",
	"registry.endpoints":        "etcd: URLs of its members, https://192.0.2.1:2379 for example.",
	"registry.ca":               "etcd: file with the authorities of its members. Empty: those of the system.",
	"registry.cert":             "etcd: file with the certificate to show to it. Empty: none.",
	"registry.key":              "etcd: file with the key of cert.",
	"registry.user":             "etcd: user, if it wants a password.",
	"registry.password_file":    "etcd: file whose first line is the password; mode 0600.",
	"registry.prefix":           "etcd: what the names of the keys begin with. Each cluster that uses the etcd\nneeds one of its own.",
	"registry.max_document":     "etcd: largest size of the registry. etcd itself refuses requests above its\n--max-request-bytes, 1.5 MiB by default.",
	"registry.members":          "etcd-embedded: nodes that are members, 3 or 5. As long as most of them run\nthe registry can be used. With cluster.tls = \"mutual\" their certificates\nneed their IP addresses: \"baton ca issue NODE --host ADDRESS\".",
	"registry.client_port":      "etcd-embedded: port of the members for all nodes, at the nodes' addresses.",
	"registry.peer_port":        "etcd-embedded: port of the members for each other.",
	"registry.heartbeat":        "etcd-embedded: how often the members' leader is heard.",
	"registry.election_timeout": "etcd-embedded: how long it may be silent before the others elect another\none; at least five heartbeats.",
	"registry.lease":            "etcd, etcd-embedded: how long a node that was elected may be silent before\nanother one is. Whole seconds.",

	"mgs.dir":   "Directory of the registry file. Empty: DATA_DIR.",
	"mgs.nodes": "Nodes of the cluster that may run the MGS, the usual one first. All need to\nsee its directory, at the same path; of several, dir must be named.",

	"mdt.dir":         "Directory of the MDT. Empty: DATA_DIR/mdt.",
	"mdt.nodes":       "The same for the MDT.",
	"mdt.block_cache": "Memory for the store's blocks.",
	"mdt.inode_cache": "Inodes kept in memory.",

	"ost.nodes": "Nodes of the cluster that may run the OST, as for the MGS. Leave it out when\nthere is one node.",
	"ost.dir":   "Directory of the OST, best on a disk of its own. The order of the tables\nnumbers the OSTs and must never change; new ones are added at the end.\nWithout any table there are two OSTs, DATA_DIR/ost0 and DATA_DIR/ost1.",

	"recovery.window_min":      "After a target died its clients send again what may be lost, before anybody\nelse is served. If some do not come, this window ends the waiting. How long\nit is comes from how long clients had to wait lately; this is the least.",
	"recovery.window_max":      "The greatest length of the window, from when the first client came.",
	"recovery.window_step":     "What progress (a client that connects, a request that is replayed) gives the\nothers at least, up to window_hard.",
	"recovery.window_hard":     "Recovery ends after this time in any case. Clients that are not through are\nevicted: what was not durable is lost to them.",
	"recovery.ping_interval":   "A frontend shows each target at least this often that it is alive.",
	"recovery.ping_timeout":    "A frontend that was silent this long is evicted. At least two intervals.",
	"recovery.suppress_pings":  "Frontends on other nodes do not show a target of this node by pings that\nthey are alive, as long as both nodes hear each other's beats and nothing\nof the frontend is uncommitted. It holds for connections that begin after\nthe node's start. Connections to the registry are watched in any case.",
	"recovery.commit_on_share": "What builds on another frontend's change waits until that is durable. So no\nfrontend depends on another one in recovery.",
	"recovery.retain_soft":     "Bytes of writes that a frontend keeps for each OST until they are durable\nthere. Above, it asks the OST to make them durable.",
	"recovery.retain_hard":     "Above, writes wait.",
	"recovery.heartbeat":       "How often a target proves that its store is still its own. A target whose\ndisk stalls for two intervals is given up; another node takes a store over\nwhen nothing was seen for three. The same on all nodes.",
	"recovery.jukebox_after":   "An NFS call that waits this long for an OST that is away is answered\nNFS3ERR_JUKEBOX: the client asks again after some seconds.",
	"recovery.imperative":      "\"on\": the registry tells this node where targets have started, so that it\nconnects to them at once, and tells others of the targets that start here.\n\"off\": this node takes no part, and since it must find out by itself, no\ntarget waits any shorter; on the node of the MGS: nobody is told anything.",
	"recovery.ir_factor":       "When the registry tells all clients that a target is back, the target waits\nthis many tenths (1 to 10) of its window for those that do not come. A small\nfactor evicts clients that are only slow to come (a busy network, a node\nthat starts itself), and they lose what was not durable: be careful below 3.\n10 leaves the window as it is.",
	"recovery.ir_startup":      "How long after its own start the registry does not vouch for anybody, since\nthe nodes have to find it first. Targets that start meanwhile wait as usual.",

	"manager.mode":           "builtin: the node with the registry decides, by beats and by what the nodes\nreport. external: a cluster manager does, through \"baton hook\". off: nobody,\naddresses move by \"baton vip move\" only.",
	"manager.quorum":         "majority: nothing is decided unless more than half of all nodes answer the\none that decides. owner: it decides alone, which two nodes need; if it is\ncut off from the other one, it takes that one's addresses. auto: majority\nwith three nodes and more, else owner.",
	"manager.confirm":        "How long a node whose beats are missing is suspected before it counts as\ndead. It is doubled when another node still hears it; when most do, it is\nunready_after.",
	"manager.unready_after":  "A node that lives and cannot serve, or does not answer, has its addresses\nmoved after this time.",
	"manager.slow_after":     "The same of a node that is slow, that is, does not get on with itself. 0s:\nnever; to be slow is no reason to move.",
	"manager.start_timeout":  "A node that was to take an address and does not listen in this time is\npassed over for another one.",
	"manager.move_timeout":   "A node that does not give an address up in this time is reported. If it does\nnot answer either, it is taken for frozen, and the address is taken away.",
	"manager.failback_delay": "How long a preferred node has to be fit before an address returns to it.\n\"never\": addresses stay where they are served.",
	"manager.hold_off":       "How long an address that was moved stays where it is if nothing forces it to\nmove. It doubles with every move.",
	"manager.hold_off_max":   "The longest hold-off. An address that has stayed longer begins anew.",
	"manager.parallel_moves": "Planned moves at the same time. Addresses of dead nodes do not wait.",

	"control.socket": "Path, at most 107 bytes; made with mode 0600. Empty: DATA_DIR/control.sock.",

	"http.address":      "IP address and port. Empty: off.",
	"http.allow_remote": "Permit an address that is not loopback. The pages need no password.",

	"log.level":  "debug, info, warn or error.",
	"log.format": "text, json, or journal: entries of systemd's journal with the values as\nfields (BATON_...), or lines with a priority prefix where there is none.",
}

// arrayExamples are the values shown for keys of arrays of tables.
var arrayExamples = map[string]string{
	"export.name":    `"/home"`,
	"export.path":    `"/"`,
	"export.clients": `["192.0.2.0/24"]`,
	"export.options": `"rw,root_squash"`,
	"ost.dir":        `"/srv/disk1/ost0"`,
	"ost.nodes":      `["n1", "n2"]`,

	"cluster.nodes.name":    `"n1"`,
	"cluster.nodes.address": `"192.0.2.1:7988"`,
}

// Keys lists all keys in the order of the default file.
var Keys = sync.OnceValue(func() []Key {
	var ks []Key
	walk(reflect.ValueOf(Default()).Elem(), "", func(name string, v reflect.Value) {
		k := Key{Name: name, Doc: keyDocs[name], Example: arrayExamples[name]}
		if k.Example == "" {
			k.Default = tomlValue(v.Interface())
		}
		ks = append(ks, k)
	})
	return ks
})

// walk visits the keys of a structure: plain ones before tables, as TOML needs.
func walk(v reflect.Value, prefix string, visit func(string, reflect.Value)) {
	for _, tables := range []bool{false, true} {
		for i := range v.NumField() {
			name, f := v.Type().Field(i).Tag.Get("toml"), v.Field(i)
			if name == "" || name == "-" {
				continue
			}
			switch {
			case f.Kind() == reflect.Struct && tables:
				walk(f, prefix+name+".", visit)
			case f.Kind() == reflect.Slice && f.Type().Elem().Kind() == reflect.Struct && tables:
				walk(reflect.New(f.Type().Elem()).Elem(), prefix+name+".", visit)
			case f.Kind() == reflect.Struct, f.Kind() == reflect.Slice && f.Type().Elem().Kind() == reflect.Struct:
			case !tables:
				visit(prefix+name, f)
			}
		}
	}
}

// tomlValue writes a value in TOML notation.
func tomlValue(v any) string {
	switch x := v.(type) {
	case string:
		return strconv.Quote(x)
	case Size:
		if s := x.String(); strings.Contains(s, " ") {
			return strconv.Quote(s)
		}
		return x.String()
	case Duration:
		return strconv.Quote(x.String())
	case Delay:
		return strconv.Quote(x.String())
	case []string:
		q := make([]string, len(x))
		for i := range x {
			q[i] = strconv.Quote(x[i])
		}
		return "[" + strings.Join(q, ", ") + "]"
	}
	return fmt.Sprint(v)
}

// SplitKey cuts a key's full name into its table's name ("" at the top level) and its own.
func SplitKey(k string) (section, name string) {
	i := strings.LastIndexByte(k, '.')
	return k[:max(0, i)], k[i+1:]
}

// IsArray tells whether a table is an array of tables, which may occur many times.
func IsArray(section string) bool {
	return section == "export" || section == "ost" || section == "cluster.nodes"
}

// SectionDoc introduces a table; "" for one without an introduction.
func SectionDoc(section string) string { return sectionDocs[section] }

// PrintDefault returns a commented configuration file that says what the
// defaults say.
func PrintDefault() string {
	var b strings.Builder
	comment := func(s string) {
		for l := range strings.Lines(s + "\n") {
			b.WriteString("# " + l)
		}
	}
	comment("Configuration of baton. Every key is listed with its default.\nSizes are bytes, or strings with KiB, MiB, GiB or TiB.")
	section := ""
	for _, k := range Keys() {
		sec, name := SplitKey(k.Name)
		if sec != section {
			section = sec
			b.WriteByte('\n')
			comment(sectionDocs[sec])
			if IsArray(sec) {
				fmt.Fprintf(&b, "#[[%s]]\n", sec)
			} else {
				fmt.Fprintf(&b, "[%s]\n", sec)
			}
		}
		b.WriteByte('\n')
		comment(k.Doc)
		if IsArray(sec) {
			fmt.Fprintf(&b, "#%s = %s\n", name, k.Example)
		} else {
			fmt.Fprintf(&b, "%s = %s\n", name, k.Default)
		}
	}
	return b.String()
}

// Markdown returns the reference of all keys, the core of
// docs/configuration.md.
func Markdown() string {
	var b strings.Builder
	row := func(k Key) {
		_, name := SplitKey(k.Name)
		def := k.Default
		if def == "" {
			def = "e.g. `" + k.Example + "`"
		} else {
			def = "`" + def + "`"
		}
		doc := strings.ReplaceAll(strings.ReplaceAll(k.Doc, "\n", " "), "|", "\\|")
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", name, def, doc)
	}
	const head = "| key | default | meaning |\n|---|---|---|\n"
	b.WriteString("### Top level\n\n" + head)
	section := ""
	for _, k := range Keys() {
		if sec, _ := SplitKey(k.Name); sec != section {
			section = sec
			title := "[" + sec + "]"
			if IsArray(sec) {
				title = "[[" + sec + "]]"
			}
			fmt.Fprintf(&b, "\n### `%s`\n\n%s\n\n%s", title, strings.ReplaceAll(sectionDocs[sec], "\n", " "), head)
		}
		row(k)
	}
	return b.String()
}
