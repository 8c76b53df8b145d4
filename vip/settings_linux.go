package vip

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Setting is a kernel setting that does not suit floating addresses.
type Setting struct {
	Key    string // as sysctl(8) takes it
	Value  int    // that holds for the interface
	Want   int
	Reason string
}

// String says what is wrong and what to do about it.
func (s Setting) String() string {
	return fmt.Sprintf("%s is %d: %s; set it with: sysctl -w %s=%d, and in /etc/sysctl.d", s.Key, s.Value, s.Reason, s.Key, s.Want)
}

// Settings returns the kernel settings that do not suit the addresses. It changes
// nothing. Without addresses it looks at what holds for all interfaces.
func (k *Kernel) Settings(as ...Address) ([]Setting, error) {
	end, err := k.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	var devs4, devs6 []string
	for _, a := range as {
		if err := check(a); err != nil {
			return nil, err
		}
		l, _, err := k.place(a)
		if err != nil {
			return nil, err
		}
		if a.Prefix.Addr().Is4() {
			devs4 = append(devs4, l.name)
		} else {
			devs6 = append(devs6, l.name)
		}
	}
	if len(as) == 0 {
		devs4 = []string{"all"}
	}
	return settings(k.sysfs, devs4, devs6)
}

// settings is Settings for interfaces with IPv4 and IPv6 addresses. The kernel
// takes the higher one of all's and the interface's value.
func settings(root string, devs4, devs6 []string) ([]Setting, error) {
	var out []Setting
	seen := map[string]bool{}
	look := func(family, dev, name string, want int, reason string) error {
		value := 0
		for _, d := range []string{"all", dev} {
			v, err := readSetting(filepath.Join(root, family, "conf", d, name))
			if err != nil {
				return err
			}
			value = max(value, v)
		}
		key := "net." + family + ".conf.all." + name
		if value < want && !seen[key] {
			seen[key] = true
			out = append(out, Setting{key, value, want, reason})
		}
		return nil
	}
	for _, d := range devs4 {
		if err := look("ipv4", d, "arp_announce", 2, "the machine may ask for neighbours in the name of a floating address, and so draw it to itself when another machine has it"); err != nil {
			return nil, err
		}
		if err := look("ipv4", d, "promote_secondaries", 1, "when the first address of a network is removed from an interface, the kernel removes the others of that network, too"); err != nil {
			return nil, err
		}
	}
	for _, d := range devs6 {
		v, err := readSetting(filepath.Join(root, "ipv6", "conf", d, "disable_ipv6"))
		if err != nil {
			return nil, err
		}
		// sysctl reads a dot in an interface's name as a separator unless it is a slash.
		key := "net.ipv6.conf." + strings.ReplaceAll(d, ".", "/") + ".disable_ipv6"
		if v != 0 && !seen[key] {
			seen[key] = true
			out = append(out, Setting{key, v, 0, "the interface takes no IPv6 address"})
		}
	}
	return out, nil
}

func readSetting(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("vip: read a kernel setting: %w", err)
	}
	v, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, fmt.Errorf("vip: kernel setting %s: %w", path, err)
	}
	return v, nil
}
