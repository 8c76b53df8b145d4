package hooks

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

const corosyncConf = `totem {
	version: 2
	cluster_name: test
	transport: udpu
	token: 10000
	crypto_cipher: none
	crypto_hash: none
}
nodelist {
%s}
quorum {
	provider: corosync_votequorum
}
system {
	sched_rr: no
	move_to_root_cgroup: no
}
logging {
	to_stderr: yes
	to_syslog: no
	timestamp: on
}
`

// Two addresses: one that a resource of its own has, and one that IPaddr2 has between
// post and pre. Both prefer n1.
const cib = `<cib crm_feature_set="3.6.0" validate-with="pacemaker-3.0" epoch="1" num_updates="0" admin_epoch="1">
<configuration>
<crm_config><cluster_property_set id="o">
<nvpair id="o1" name="stonith-enabled" value="false"/>
<nvpair id="o2" name="cluster-recheck-interval" value="60s"/>
<nvpair id="o3" name="dc-deadtime" value="2s"/>
</cluster_property_set></crm_config>
<nodes/>
<resources>
<primitive id="whole" class="ocf" provider="baton" type="baton-vip">
<instance_attributes id="w-a"><nvpair id="w-ip" name="ip" value="192.0.2.50"/></instance_attributes>
<operations>
<op id="w-s" name="start" interval="0" timeout="20s"/><op id="w-e" name="stop" interval="0" timeout="20s"/>
<op id="w-m" name="monitor" interval="1s" timeout="10s"/>
</operations>
</primitive>
<group id="group">
<primitive id="post" class="ocf" provider="baton" type="baton-vip">
<instance_attributes id="po-a"><nvpair id="po-ip" name="ip" value="192.0.2.60"/><nvpair id="po-r" name="role" value="post"/></instance_attributes>
<operations><op id="po-m" name="monitor" interval="1s" timeout="10s"/></operations>
</primitive>
<primitive id="address" class="ocf" provider="heartbeat" type="IPaddr2">
<instance_attributes id="ad-a"><nvpair id="ad-ip" name="ip" value="192.0.2.60"/><nvpair id="ad-m" name="cidr_netmask" value="24"/><nvpair id="ad-n" name="nic" value="eth0"/></instance_attributes>
<operations><op id="ad-mo" name="monitor" interval="2s" timeout="10s"/></operations>
</primitive>
<primitive id="pre" class="ocf" provider="baton" type="baton-vip">
<instance_attributes id="pr-a"><nvpair id="pr-ip" name="ip" value="192.0.2.60"/><nvpair id="pr-r" name="role" value="pre"/></instance_attributes>
<operations><op id="pr-m" name="monitor" interval="1s" timeout="10s"/></operations>
</primitive>
</group>
</resources>
<constraints>
<rsc_location id="l1" rsc="whole" node="n1" score="100"/>
<rsc_location id="l2" rsc="group" node="n1" score="100"/>
<rsc_location id="l3" rsc="whole" node="n2" score="50"/>
<rsc_location id="l4" rsc="group" node="n2" score="50"/>
</constraints>
</configuration>
<status/>
</cib>
`

const agent = "/usr/lib/ocf/resource.d/baton/baton-vip"

// pacemaker starts the cluster's software on a machine.
func (m *machine) pacemaker() {
	m.s.t.Helper()
	var nodes strings.Builder
	for i := 1; i <= 3; i++ {
		fmt.Fprintf(&nodes, "	node {\n		ring0_addr: 192.0.2.%d\n		name: n%d\n		nodeid: %d\n	}\n", i, i, i)
	}
	m.write("/etc/corosync/corosync.conf", fmt.Sprintf(corosyncConf, nodes.String()))
	m.write("/var/lib/pacemaker/cib/cib.xml", cib)
	m.agent()
	m.sh(`chown -R hacluster:haclient /var/lib/pacemaker /etc/pacemaker && chmod 600 /var/lib/pacemaker/cib/cib.xml
mkdir -p /run/crm /var/log/pacemaker /var/log/corosync /var/lib/corosync && chown hacluster:haclient /run/crm /var/log/pacemaker && chmod 750 /run/crm`)
	m.spawn("corosync", "/usr/sbin/corosync", "-f")
	m.s.wait("corosync on "+m.Name(), func() bool {
		_, err := m.Sh(m.s.ctx, "corosync-quorumtool -s")
		return err == nil || strings.Contains(err.Error(), "Quorate") // without quorum it exits with 2
	})
	// Its daemons write as another user.
	log := "/srv/site/" + m.Name() + ".pcmk.log"
	m.sh("touch " + log + " && chmod 666 " + log)
	m.spawn("pacemaker", "/usr/bin/env", "PCMK_logfile="+log, "PCMK_logpriority=info", "/usr/sbin/pacemakerd", "-f")
}

func (m *machine) agent() {
	m.s.t.Helper()
	m.sh("mkdir -p /usr/lib/ocf/resource.d/baton && cp /usr/share/baton/ocf/baton-vip " + agent)
}

// TestOCF has ocf-tester look at the agent.
func TestOCF(t *testing.T) {
	s := newSite(t, "192.0.2.50")
	m := s.boot(1)
	m.agent()
	for _, params := range []string{"-o ip=192.0.2.50", "-o ip=192.0.2.50 -o role=post"} {
		out, err := m.Sh(s.ctx, "ocf-tester -n nfs "+params+" "+agent)
		if err != nil || !strings.Contains(out, "passed all tests") {
			t.Errorf("%s: %v\n%s", params, err, out)
		}
	}
	// pre needs the address.
	m.sh("ip address add 192.0.2.50/24 dev eth0")
	out, err := m.Sh(s.ctx, "ocf-tester -n nfs -o ip=192.0.2.50 -o role=pre "+agent)
	if err != nil || !strings.Contains(out, "passed all tests") {
		t.Errorf("pre: %v\n%s", err, out)
	}
	for _, c := range []struct {
		script string
		code   string
	}{
		{"OCF_RESKEY_ip=nowhere " + agent + " validate-all", "6"},
		{"OCF_RESKEY_ip=192.0.2.50 OCF_RESKEY_role=no " + agent + " start", "6"},
		{"OCF_RESKEY_ip=192.0.2.50 " + agent + " promote", "3"},
		{"OCF_RESKEY_ip=192.0.2.50 OCF_RESKEY_binary=/no/baton " + agent + " start", "5"},
		{"OCF_RESKEY_ip=192.0.2.50 OCF_RESKEY_binary=/no/baton " + agent + " stop", "0"},
		{"OCF_RESKEY_ip=192.0.2.50 OCF_RESKEY_binary=/no/baton OCF_RESKEY_CRM_meta_interval=0 " + agent + " monitor", "7"},
		{"OCF_RESKEY_ip=192.0.2.50 OCF_RESKEY_config=/no/baton.toml " + agent + " start", "5"},
		{"OCF_RESKEY_ip=192.0.2.50 OCF_RESKEY_socket=/no/socket " + agent + " start", "1"},
	} {
		if out := m.sh("export OCF_ROOT=/usr/lib/ocf; " + c.script + " >/tmp/out 2>&1; echo $?"); strings.TrimSpace(out) != c.code {
			t.Errorf("%s: exit %s, want %s", c.script, strings.TrimSpace(out), c.code)
		}
	}
}

// TestPacemaker moves addresses of a running baton by a real cluster of three nodes: an
// order of the administrator, an address that is not served, the death of baton, the
// death of a node, its return, a stop.
func TestPacemaker(t *testing.T) {
	t.Parallel()
	const whole, group = "192.0.2.50", "192.0.2.60"
	s := newReal(t, 3, whole, group)
	begin := time.Now()
	for i := 1; i <= 3; i++ {
		s.m[fmt.Sprint("n", i)].pacemaker()
	}
	both := func(what, node string, orderly bool) {
		t.Helper()
		s.reach(what, whole, node, orderly)
		s.reach(what, group, node, orderly)
	}
	for _, a := range s.addrs {
		s.owner(a.String(), "n2", "n3")
		s.work(a)
	}
	both("start", "n1", true)
	t.Logf("online after %v", time.Since(begin).Round(100*time.Millisecond))

	n2 := s.m["n2"]
	at := time.Now()
	n2.sh("crm_resource --move --resource whole --node n2 && crm_resource --move --resource group --node n2")
	both("move", "n2", true)
	s.givenMove("move", group, "n1", "n2", at)
	if gave := s.stages(whole, "n1", at); !subsequence(gave, "refuse", "drain", "commit", "remove", "told", "finish") {
		t.Errorf("move: n1 gave %s up by %q", whole, gave)
	}

	// The monitor sees that an address is not served, and has it taken again.
	at = time.Now()
	n2.sh("baton hook release " + whole + " && baton hook release --given --stage drain " + group)
	s.wait("end of the service", func() bool { return len(s.stages(whole, "n2", at)) > 0 && len(s.stages(group, "n2", at)) > 0 })
	both("monitor failed", "n2", true)
	n2.sh("crm_resource --cleanup >/dev/null 2>&1")

	// baton dies: Pacemaker finds out, and has it taken where one runs.
	n2.killBaton()
	both("baton killed", "n1", false)
	n2.serve()
	n2.sh("crm_resource --cleanup >/dev/null 2>&1")
	both("failback", "n2", true)

	// baton stops: its monitor waits until the addresses are given up, in order.
	n2.stopBaton()
	both("baton stopped", "n1", true)
	n2.serve()
	n2.sh("crm_resource --cleanup >/dev/null 2>&1")
	both("baton started", "n2", true)

	n2.kill()
	both("node killed", "n1", false)

	// The node returns; --move has left a rule that prefers it.
	n2 = s.boot(2)
	n2.pacemaker()
	both("node returned", "n2", true)

	// An orderly stop of the cluster's software hands over.
	n2.sh("timeout 60 pacemakerd --shutdown >/dev/null 2>&1 || kill $(pidof pacemakerd)")
	both("Pacemaker stopped", "n1", true)
	t.Logf("all after %v", time.Since(begin).Round(100*time.Millisecond))
	s.finish()
}
