/*
 * LD_PRELOAD library for linux.uml on CPUs whose extended register state is
 * larger than the buffer User Mode Linux was built with (AMX). The kernel
 * refuses to set a partial state, so this library keeps a full-size buffer:
 * a read copies its beginning to the caller, a write merges the caller's part
 * into the thread's current full state. Components above bit 9 (AMX among them)
 * are marked as not in use, since UML neither saves nor restores them.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
#include <stdint.h>

#ifndef NT_X86_XSTATE
#define NT_X86_XSTATE 0x202
#endif

/* UML's kernel is one thread with small stacks: a static buffer is safe. */
static char full[65536] __attribute__((aligned(64)));

#define XSTATE_BV 512 /* offset of the header's bitmap in the XSAVE area */
#define KEEP 0x3ffUL  /* bits 0 to 9 */

long ptrace(enum __ptrace_request req, ...)
{
	va_list ap;
	va_start(ap, req);
	pid_t pid = va_arg(ap, pid_t);
	void *addr = va_arg(ap, void *);
	void *data = va_arg(ap, void *);
	va_end(ap);

	int r = (int)req;
	if (r == PTRACE_PEEKTEXT || r == PTRACE_PEEKDATA || r == PTRACE_PEEKUSER) {
		/* The system call stores the word; the C function returns it. */
		long word;
		if (syscall(SYS_ptrace, r, pid, addr, &word) < 0)
			return -1;
		errno = 0;
		return word;
	}
	if ((r != PTRACE_GETREGSET && r != PTRACE_SETREGSET) || (uintptr_t)addr != NT_X86_XSTATE)
		return syscall(SYS_ptrace, r, pid, addr, data);

	struct iovec *user = data;
	struct iovec iov = { full, sizeof full };
	if (syscall(SYS_ptrace, PTRACE_GETREGSET, pid, addr, &iov) < 0)
		return -1;
	size_t n = user->iov_len < iov.iov_len ? user->iov_len : iov.iov_len;
	if (r == PTRACE_GETREGSET) {
		memcpy(user->iov_base, full, n);
		user->iov_len = n;
		return 0;
	}
	memcpy(full, user->iov_base, n);
	uint64_t bv;
	memcpy(&bv, full + XSTATE_BV, sizeof bv);
	bv &= KEEP;
	memcpy(full + XSTATE_BV, &bv, sizeof bv);
	return syscall(SYS_ptrace, PTRACE_SETREGSET, pid, addr, &iov);
}
