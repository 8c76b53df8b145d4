package status_test

import (
	"bytes"
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/internal/status/statustest"
)

// What is not known is said, and not what was known once: 001.123..001.128.
func TestRecoveryText(t *testing.T) {
	var b bytes.Buffer
	startup := statustest.Recovery()
	startup.Registry.State, startup.Registry.StartupLeft, startup.Registry.NotifyCount = "startup", 25*time.Second, 0
	startup.Watch.Version, startup.Watch.Current = 17, true
	startup.Targets = nil
	away := statustest.Recovery()
	away.Registry, away.RegistryError = nil, "connection refused\x1b[1m"
	away.Watch.Connected, away.Watch.Error, away.Watch.Imperative = false, "connection refused", false
	for _, r := range []*status.Recovery{
		statustest.Recovery(), startup, away,
		{Node: "n1", Alone: true, Targets: []status.RecoveryTarget{{Name: "MDT0000", Kind: status.KindMDT, Node: "n1", Instance: 4, State: "COMPLETE"}}},
	} {
		if err := status.RecoveryText(&b, r); err != nil {
			t.Fatal(err)
		}
		b.WriteString("--\n")
	}
	golden(t, "recovery.txt", b.Bytes())
}

func TestRecoveryJSON(t *testing.T) {
	want := statustest.Recovery()
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got status.Recovery
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, &got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}
