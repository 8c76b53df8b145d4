package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// modprobe loads modules of the running kernel with their dependencies. The
// guest has the host's root file system, where kmod may be missing.
func modprobe(names []string) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	base := "/usr/lib/uml/modules/" + string(bytes.TrimRight(u.Release[:], "\x00"))
	b, err := os.ReadFile(base + "/modules.dep")
	if err != nil {
		return err
	}
	deps := map[string][]string{} // name -> own file, then what it needs
	for line := range strings.Lines(string(b)) {
		file, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if ok {
			name := strings.TrimSuffix(path.Base(file), ".ko")
			deps[name] = append([]string{file}, strings.Fields(rest)...)
		}
	}
	for _, n := range names {
		files := deps[n]
		if files == nil {
			return fmt.Errorf("no module %s below %s", n, base)
		}
		// The last dependency is the most basic one.
		for i := len(files) - 1; i >= 0; i-- {
			f, err := os.Open(base + "/" + files[i])
			if err != nil {
				return err
			}
			err = unix.FinitModule(int(f.Fd()), "", 0)
			f.Close()
			if err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("load %s: %w", files[i], err)
			}
		}
	}
	return nil
}
