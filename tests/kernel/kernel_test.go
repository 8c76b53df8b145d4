package kernel

import (
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/bench/nfsload"
)

// TestClient runs everything that needs no restart of the server against one
// server, one guest (or two) for each subtest.
func TestClient(t *testing.T) {
	w := newWorld(t)

	t.Run("mount", func(t *testing.T) {
		for name, o := range map[string]string{
			"defaults": "", "v3-tcp": "vers=3,tcp", "mount-udp": "vers=3,tcp,mountproto=udp", "nolock": "vers=3,nolock",
			"small-io": "vers=3,rsize=4096,wsize=4096", "sync": "vers=3,sync,noac", "no-readdirplus": "vers=3,nordirplus",
		} {
			t.Run(name, func(t *testing.T) {
				r := w.run(t, time.Minute, guest{options: o, script: `
grep " $MNT nfs " /proc/mounts
head -c 3000000 /dev/urandom >f; cp f g; cmp f g; mv g h; rm f h; ls -a; df . ; rpcinfo -p ` + serverAddr})
				for _, want := range []string{"vers=3", "proto=tcp", "addr=" + serverAddr} {
					if len(r) == 1 && !strings.Contains(r[0].Output, want) {
						t.Errorf("mount without %s", want)
					}
				}
			})
		}
	})
	t.Run("tree", func(t *testing.T) {
		n := 20000
		share := bed.Dir(t)
		if out, err := exec.Command(w.work, "tree", "tar", "-n", fmt.Sprint(n), "-seed", "42", filepath.Join(share, "tree.tar")).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		w.run(t, 20*time.Minute, guest{options: "vers=3", share: share, script: fmt.Sprintf(`
date +%%s; mkdir t; tar -C t --delay-directory-restore -xf $SHARE/tree.tar; date +%%s; echo 3 >/proc/sys/vm/drop_caches
$WORK tree verify -n %d -seed 42 t; date +%%s; rm -rf t; date +%%s; [ -z "$(ls -A)" ]`, n)})
	})
	for _, c := range []struct {
		name, script, options string
		limit                 time.Duration
	}{
		{"names", "$WORK names .", "vers=3", time.Minute},
		{"mmap", "$WORK mmap .", "vers=3", 2 * time.Minute},
		{"silly-rename", "$WORK silly .", "vers=3", time.Minute},
		{"holes", "$WORK holes -seed 1 . && $WORK holes -seed 2 .", "vers=3", 4 * time.Minute},
		{"holes-small-io", "$WORK holes -seed 3 -ops 1500 .", "vers=3,rsize=4096,wsize=8192", 4 * time.Minute},
		{"direct", "$WORK direct .", "vers=3", 2 * time.Minute},
		{"rename-storm", "$WORK renames -n 4000 .", "vers=3", 3 * time.Minute},
		{"permissions", "$WORK perms .", "vers=3", time.Minute},
		{"permissions-noac", "$WORK perms .", "vers=3,noac", time.Minute},
		{"readdir-changing", "$WORK readdir -n 3000 .", "vers=3", 3 * time.Minute},
		{"readdir-changing-plain", "$WORK readdir -n 2000 .", "vers=3,nordirplus", 3 * time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) { w.run(t, c.limit, guest{script: c.script, options: c.options}) })
	}
	t.Run("directory-100000", func(t *testing.T) { bigDirectory(t, w, 100_000) })
	t.Run("directory-1000000", func(t *testing.T) {
		if os.Getenv("BATON_BIG") != "1" {
			t.Skip("SKIPPED, reason: filling a directory with a million entries takes long; BATON_BIG=1 runs it")
		}
		bigDirectory(t, w, 1_000_000)
	})
	t.Run("bigfile", func(t *testing.T) {
		limit := int64(math.MaxInt64)
		if w.srv.Name() != "baton" {
			limit = 1 << 43 // what the file system below it allows
		}
		w.run(t, time.Minute, guest{options: "vers=3", script: fmt.Sprintf("$WORK bigfile -max %d .", limit)})
	})
	t.Run("read-only-export", func(t *testing.T) {
		w.run(t, time.Minute, guest{options: "vers=3", export: "/ro", script: "$WORK readonly ."})
	})
	t.Run("read-only-mount", func(t *testing.T) {
		w.run(t, time.Minute, guest{options: "vers=3,ro", export: "/sq", script: "$WORK readonly ."})
	})
	t.Run("root-squash", func(t *testing.T) {
		w.run(t, time.Minute, guest{options: "vers=3", export: "/sq", script: fmt.Sprintf(`
mkdir /run/rw; mount -t nfs -o vers=3 %s:/rw /run/rw; chmod 1777 /run/rw; umount /run/rw
$WORK squash .`, serverAddr)})
	})
	t.Run("append-two-clients", func(t *testing.T) {
		g := func(i int) guest {
			return guest{options: "vers=3", dir: "append", script: fmt.Sprintf("$WORK append -id %d -peers 2 -n 150 .", i)}
		}
		w.run(t, 5*time.Minute, g(0), g(1))
	})
	t.Run("git-and-go-build", func(t *testing.T) { gitAndGo(t, w) })
	t.Run("dbench", func(t *testing.T) {
		need(t, "dbench")
		// Its load has byte-range locks.
		w.run(t, 3*time.Minute, guest{options: lockingMount, script: "dbench -D . -t 20 4 >$OUT/dbench.log; tail -25 $OUT/dbench.log; grep -q ^Throughput $OUT/dbench.log; rm -rf clients; [ -z \"$(ls -A)\" ]"})
	})
	t.Run("fio", func(t *testing.T) {
		need(t, "fio")
		const common = "--directory=. --thread --group_reporting --minimal --output-format=terse"
		for name, args := range map[string]string{
			"randrw-verify": "--name=a --rw=randrw --bs=4k --size=32m --numjobs=2 --ioengine=psync --verify=crc32c --verify_fatal=1 --fsync_on_close=1",
			"write-verify":  "--name=b --rw=write --bs=256k --size=192m --ioengine=psync --verify=crc32c --verify_fatal=1 --end_fsync=1",
			"fsync":         "--name=c --rw=randwrite --bs=4k --size=4m --fsync=1 --ioengine=psync --verify=crc32c --verify_fatal=1",
			"direct-verify": "--name=d --rw=randwrite --bs=16k --size=32m --direct=1 --ioengine=psync --numjobs=2 --verify=crc32c --verify_fatal=1",
			"mmap-verify":   "--name=e --rw=randwrite --bs=4k --size=16m --ioengine=mmap --verify=crc32c --verify_fatal=1",
		} {
			t.Run(name, func(t *testing.T) {
				w.run(t, 4*time.Minute, guest{options: "vers=3", script: "fio " + common + " " + args + " >$OUT/fio.log; cut -c1-100 $OUT/fio.log; rm -f *.0 *.1"})
			})
		}
	})
	t.Run("stress-ng", func(t *testing.T) {
		need(t, "stress-ng")
		for _, class := range []string{"dir", "dirdeep", "filename", "link", "symlink", "rename", "hdd", "seek", "utime", "chmod", "chown", "dentry", "getdent", "iomix", "unlink-absent"} {
			args := fmt.Sprintf("--%s 2", class)
			switch class {
			case "hdd":
				args += " --hdd-bytes 32M --hdd-opts direct,fsync"
			case "seek":
				args += " --seek-size 16M"
			case "iomix":
				args += " --iomix-bytes 16M"
			case "dentry":
				args += " --dentries 300"
			case "dir":
				args += " --dir-dirs 512"
			case "filename":
				args += " --filename-opts posix"
			case "unlink-absent":
				args = "--touch 2"
			}
			t.Run(strings.Fields(args)[0][2:], func(t *testing.T) {
				w.run(t, 2*time.Minute, guest{options: "vers=3", script: "stress-ng --temp-path . --timeout 6 --verify --metrics-brief " + args + "; ls -A | head; [ -z \"$(ls -A)\" ]"})
			})
		}
	})
}

// gitAndGo clones a repository of the host onto the mount, builds its program
// there with the build cache on the mount as well, and runs it from there.
func gitAndGo(t *testing.T, w *world) {
	need(t, "git")
	share := bed.Dir(t)
	repo := filepath.Join(share, "repo")
	files := map[string]string{
		"go.mod":          "module example.org/hello\n\ngo 1.20\n",
		"main.go":         "package main\n\nimport \"example.org/hello/greet\"\n\nfunc main() { println(greet.Text(3)) }\n",
		"greet/greet.go":  "// Package greet makes greetings.\npackage greet\n\nimport \"strconv\"\n\n// Text returns a greeting.\nfunc Text(n int) string { return \"hello \" + strconv.Itoa(n) }\n",
		"greet/other.go":  "package greet\n\nvar table = [...]string{\"a\", \"b\"}\n\nfunc init() { _ = table }\n",
		"doc/README.text": strings.Repeat("A line of text.\n", 1000),
	}
	for i := range 300 {
		files[fmt.Sprintf("doc/part%d/page%d", i%17, i)] = strings.Repeat(fmt.Sprintln("page", i), i+1)
	}
	for name, text := range files {
		p := filepath.Join(repo, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "."}, {"-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "first"}} {
		cmd := exec.Command("git", append([]string{"-C", repo}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	goroot, err := exec.Command(bed.GoTool(), "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	// The go command locks files.
	w.run(t, 12*time.Minute, guest{options: lockingMount, mem: 1024, share: share, script: fmt.Sprintf(`
export GOROOT=%s GOFLAGS=-mod=mod GOPROXY=off GOTOOLCHAIN=local GOSUMDB=off GOTELEMETRY=off CGO_ENABLED=0 GOPATH=/tmp/gopath GOCACHE=$PWD/cache HOME=/tmp GOTMPDIR=$PWD/tmp GOMAXPROCS=%d
mkdir tmp
git -c safe.directory=* clone -q --no-hardlinks $SHARE/repo clone
cd clone
git fsck --strict
[ -z "$(git status --porcelain)" ]
date +%%s
$GOROOT/bin/go build -trimpath -o hello .
date +%%s
./hello 2>&1 | grep 'hello 3'
echo change >>doc/README.text; git -c user.name=t -c user.email=t@example.org commit -qam second; git gc -q; git fsck
cd ..; chmod -R u+w cache; rm -rf cache clone tmp; ls -A; [ -z "$(ls -A)" ]`, strings.TrimSpace(string(goroot)), runtime.NumCPU())})
}

// bigDirectory lets the kernel's client work in a directory of n entries. The
// load generator fills it, many times faster than a client that makes one
// entry of a directory after the other.
func bigDirectory(t *testing.T, w *world, n int) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dial := func(port int, prog uint32) *nfsload.Conn {
		nc, err := w.node.DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", serverAddr, port))
		if err != nil {
			t.Fatal(err)
		}
		return nfsload.NewConn(nc, prog)
	}
	m := dial(bed.MountPort, nfsload.ProgMount)
	root, err := m.Mount("/rw")
	m.Close()
	if err != nil {
		t.Fatal(err)
	}
	c := dial(bed.NFSPort, nfsload.ProgNFS)
	defer c.Close()
	name := fmt.Sprint("directory-", n)
	dir, err := c.Mkdir(root, name)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	next := 0
	made, err := c.Run(64, start.Add(time.Hour), &nfsload.Funcs{
		NextFunc: func(c *nfsload.Conn, _ int) (uint32, bool) {
			if next == n {
				return 0, false
			}
			next++
			c.Dirop(dir, fmt.Appendf(nil, "entry-%08d", next))
			c.U32(1)
			c.Sattr(0o644)
			return nfsload.ProcCreate, true
		},
		ReplyFunc: nfsload.CheckStatus(nfsload.ProcCreate),
	})
	if err != nil || made != int64(n) {
		t.Fatalf("made %d entries: %v", made, err)
	}
	t.Logf("filled in %.1f s", time.Since(start).Seconds())
	w.run(t, 5*time.Minute, guest{options: "vers=3", dir: name, mem: 1536, script: fmt.Sprintf("$WORK bigdir -n %d .", n)})
	es, err := c.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	next = 0
	if _, err := c.Run(64, time.Now().Add(time.Hour), &nfsload.Funcs{
		NextFunc: func(c *nfsload.Conn, _ int) (uint32, bool) {
			if next == len(es) {
				return 0, false
			}
			c.Dirop(dir, []byte(es[next].Name))
			next++
			return nfsload.ProcRemove, true
		},
		ReplyFunc: nfsload.CheckStatus(nfsload.ProcRemove),
	}); err != nil {
		t.Fatal(err)
	}
	if err := c.Unlink(root, name, true); err != nil {
		t.Fatal(err)
	}
}
