// SPDX-License-Identifier: Apache-2.0
/*
 * Ways to be born that libraries do not take: `births WAY ADDRESS PORT TAG`. Each ends in a shell that connects, has
 * `TAG-leaf` among its arguments, and says its own process id.
 */
#define _GNU_SOURCE
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static char *address, *port, leaf[64];

static void become(void)
{
	execl("/bin/bash", "/bin/bash", "-c", "exec 3<>\"/dev/tcp/$1/$2\" && echo \"$$ $0\" >&3", leaf, address, port, NULL);
	_exit(1);
}

/* Everybody has gone when nobody holds the other end of the pipe. */
static int last(int *done)
{
	char byte;

	close(done[1]);
	return read(done[0], &byte, 1) != 0;
}

int main(int argc, char **argv)
{
	int done[2];

	if (argc != 5 || pipe(done))
		return 2;
	address = argv[2];
	port = argv[3];
	snprintf(leaf, sizeof(leaf), "%s-leaf", argv[4]);
	if (!strcmp(argv[1], "vfork")) {
		if (!vfork())
			become();
	} else if (!strcmp(argv[1], "clone3")) {
		struct clone_args args = {.flags = CLONE_PARENT};
		long child = syscall(SYS_clone3, &args, sizeof(args));

		if (child < 0)
			return 3;
		if (!child)
			become();
	} else if (!strcmp(argv[1], "subreaper")) {
		int status;

		prctl(PR_SET_CHILD_SUBREAPER, 1);
		if (!fork()) {
			setsid();
			if (!fork()) {
				/* its parent leads the session until it dies; then it is ours */
				while (getppid() == getpgrp())
					usleep(1000);
				become();
			}
			_exit(0);
		}
		while (wait(&status) > 0)
			;
	} else {
		return 2;
	}
	return last(done);
}
