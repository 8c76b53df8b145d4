// Package deps pins the modules until their users exist.
package deps

import (
	_ "github.com/BurntSushi/toml"
	_ "github.com/anishathalye/porcupine"
	_ "github.com/cespare/xxhash/v2"
	_ "github.com/cockroachdb/datadriven"
	_ "github.com/cockroachdb/pebble/v2"
	_ "github.com/cockroachdb/pebble/v2/vfs"
	_ "github.com/cockroachdb/pebble/v2/vfs/errorfs"
	_ "github.com/coreos/go-systemd/v22/daemon"
	_ "github.com/go-git/go-billy/v5"
	_ "github.com/go-git/go-billy/v5/memfs"
	_ "github.com/google/go-cmp/cmp"
	_ "github.com/prometheus/client_golang/prometheus"
	_ "github.com/prometheus/client_golang/prometheus/promhttp"
	_ "github.com/spf13/cobra"
	_ "github.com/vmware/go-nfs-client/nfs"
	_ "github.com/vmware/go-nfs-client/nfs/rpc"
	_ "github.com/willscott/go-nfs"
	_ "github.com/willscott/go-nfs/helpers"
	_ "github.com/willscott/go-nfs-client/nfs"
	_ "golang.org/x/sys/unix"
)
