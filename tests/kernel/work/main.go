// Work is the helper program that runs inside guests: a static binary with one
// subcommand for each thing that a shell script cannot do exactly. Every
// subcommand exits with 0 only if everything was as it should be.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

type command struct {
	run  func(args []string) error
	help string
}

var commands = map[string]command{}

func init() {
	commands = map[string]command{
		"modprobe": {modprobe, "MODULE...: load kernel modules and what they need"},
		"tree":     {tree, "tar|verify -n N -seed S DIR: write or verify a tree of files"},
		"mmap":     {mmapTest, "DIR: shared mappings"},
		"append":   {appendTest, "-id I -peers P -n N DIR: O_APPEND under lock files from several clients"},
		"silly":    {silly, "DIR: files removed while open"},
		"holes":    {holes, "-seed S -ops N DIR: writes, holes and truncation against a model"},
		"direct":   {direct, "-seed S DIR: O_DIRECT"},
		"renames":  {renames, "-n N DIR: concurrent renames"},
		"perms":    {perms, "DIR: owners, groups, modes (needs root)"},
		"as":       {as, "internal: one operation as another user"},
		"bigfile":  {bigfile, "-max OFFSET DIR: sparse files with large offsets"},
		"readdir":  {readdirTest, "-n N DIR: reading a directory while it changes"},
		"bigdir":   {bigdir, "-n N DIR: a directory of many entries"},
		"readonly": {readonly, "DIR: a read-only export refuses changes"},
		"squash":   {squash, "DIR: root is nobody"},
		"names":    {names, "DIR: file names, links, special files, times"},
		"agent":    {agent, "-listen ADDR: run programs for the lock suite"},
		"owner":    {owner, "[DIR]: internal: one lock owner, driven over standard input"},
		"crash":    {crash, "-control DIR DIR: work against a model while the server crashes"},
		"moves":    {moves, "-control DIR -id I -with WORKERS DIR: work while the address moves"},
		"share":    {share, "-control DIR -id I -peer ADDR DIR: the same files as another guest, under locks, while servers crash"},
	}
}

func main() {
	if len(os.Args) < 2 || commands[os.Args[1]].run == nil {
		var names []string
		for n, c := range commands {
			names = append(names, "  "+n+" "+c.help)
		}
		sort.Strings(names)
		fmt.Fprintln(os.Stderr, "usage: work COMMAND [flags] [args]\n"+strings.Join(names, "\n"))
		os.Exit(2)
	}
	if err := commands[os.Args[1]].run(os.Args[2:]); err != nil {
		fmt.Printf("work %s: FAILED: %v\n", os.Args[1], err)
		os.Exit(1)
	}
	fmt.Printf("work %s: ok\n", os.Args[1])
}

// parse parses flags followed by exactly one directory.
func parse(f *flag.FlagSet, args []string) (dir string, err error) {
	if err := f.Parse(args); err != nil {
		return "", err
	}
	if f.NArg() != 1 {
		return "", errors.New("want exactly one directory")
	}
	return f.Arg(0), nil
}

// fill writes pseudo-random bytes that depend on seed alone into b.
func fill(b []byte, seed uint64) {
	r := rand.NewPCG(seed, 0x6261746f6e)
	for len(b) >= 8 {
		v := r.Uint64()
		b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24), byte(v>>32), byte(v>>40), byte(v>>48), byte(v>>56)
		b = b[8:]
	}
	v := r.Uint64()
	for i := range b {
		b[i] = byte(v >> (8 * i))
	}
}

// pattern returns n bytes of fill.
func pattern(n int, seed uint64) []byte {
	b := make([]byte, n)
	fill(b, seed)
	return b
}

// equal reports the first difference between two byte slices.
func equal(got, want []byte) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d bytes, want %d", len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			n := 0
			for j := i; j < len(got); j++ {
				if got[j] != want[j] {
					n++
				}
			}
			return fmt.Errorf("byte %d is %#x, want %#x; %d bytes differ", i, got[i], want[i], n)
		}
	}
	return nil
}

// dropCaches makes the kernel forget clean pages, names and attributes, so
// that what is read next comes from the server.
func dropCaches() error {
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0o200)
}

// noSilly fails if a silly-renamed file was left below dir.
func noSilly(dir string) error {
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if strings.HasPrefix(d.Name(), ".nfs") {
			return fmt.Errorf("%s was left behind", p)
		}
		return nil
	})
}
