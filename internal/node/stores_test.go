package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/recovery/mgs"
)

func TestCheckStores(t *testing.T) {
	for _, x := range []struct {
		name string
		made int      // OSTs in the registry; -1: no registry
		osts int      // OSTs in the configuration
		used []string // directories with something in them
		want string   // of the error, "" for none
	}{
		{"new", -1, 2, nil, ""},
		{"first start broken off", 0, 2, []string{"ost0"}, ""},
		{"all there", 2, 2, []string{"mdt", "ost0", "ost1"}, ""},
		{"one more OST", 2, 3, []string{"mdt", "ost0", "ost1"}, ""},
		{"one OST less", 2, 1, []string{"mdt", "ost0", "ost1"}, "2"},
		{"MDT gone", 2, 2, []string{"ost0", "ost1"}, "MDT0000"},
		{"first OST gone", 2, 2, []string{"mdt", "ost1"}, "OST0000"},
		{"last OST gone", 2, 2, []string{"mdt", "ost0"}, "OST0001"},
		{"registry gone", -1, 2, []string{"ost0", "ost1"}, "OST0000"},
	} {
		t.Run(x.name, func(t *testing.T) {
			dir := t.TempDir()
			cfg := &config.Config{DataDir: dir, MGS: config.MGS{Dir: dir}}
			cfg.MDT.Dir = filepath.Join(dir, "mdt")
			for i := range x.osts {
				cfg.OST = append(cfg.OST, config.OST{Dir: filepath.Join(dir, "ost"+string(rune('0'+i)))})
			}
			for _, d := range x.used {
				if err := os.MkdirAll(filepath.Join(dir, d, "something"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			// What a new file system has does not count.
			if err := os.MkdirAll(filepath.Join(dir, "ost1", "lost+found"), 0o700); err != nil {
				t.Fatal(err)
			}
			if x.made >= 0 {
				reg, err := mgs.Open(dir, mgs.FileOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if _, _, err := reg.StartClient(ctx, ""); err != nil {
					t.Fatal(err)
				}
				if err := reg.SetOSTs(ctx, x.made); err != nil {
					t.Fatal(err)
				}
			}
			reg, err := mgs.Open(dir, mgs.FileOptions{})
			if err != nil {
				t.Fatal(err)
			}
			err = checkStores(ctx, cfg, reg)
			switch {
			case x.want == "" && err != nil:
				t.Error(err)
			case x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want)):
				t.Errorf("%v, want an error about %q", err, x.want)
			}
		})
	}
}

// The directories of a cluster's node are not opened as if it had everything.
func TestNoFilesOfAStoppedClusterNode(t *testing.T) {
	c := conf(t, t.TempDir())
	c.Cluster.Node = "n1"
	if _, _, err := OpenFS(ctx, c, nil); err == nil || !strings.Contains(err.Error(), "node n1 is part of a cluster") {
		t.Error(err)
	}
}
