package vipctl

import "testing"

// Only what is an IPv6 address in brackets loses them.
func TestUnbracket(t *testing.T) {
	for in, want := range map[string]string{
		"[2001:db8::50]": "2001:db8::50", "[2001:db8::50]/64": "2001:db8::50/64", "2001:db8::50": "2001:db8::50",
		"192.0.2.50": "192.0.2.50", "[192.0.2.50]": "[192.0.2.50]", "[::1": "[::1", "::1]": "::1]", "[]": "[]", "": "",
	} {
		if got := Unbracket(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
