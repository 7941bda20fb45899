/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A fork storm whose processes connect, say who they are, and hold the answer against it.
 *
 *   storm TAG COUNT PARALLEL    COUNT processes, or until SIGTERM, PARALLEL at a time; prints the totals as JSON
 *   storm TAG INDEX - FD        one of them, after execve; the totals are in the shared memory FD
 *
 * Of every 32 processes one calls execve first, and two are orphans by then; half of them have a child that exits at
 * once. The answer is `<tgid> <tag>` as the listener has it from the kernel. `T` comes from the target itself: nobody may
 * ever get there. A process that is refused or cut off tries again until it has an answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PORT 5432
#define PATIENCE_S 60

struct totals {
	long done, right, wrong, missing, direct, lost, forks;
	char what[200];
};

static struct totals *totals;
static volatile sig_atomic_t ended;

#define ADD(field) __atomic_add_fetch(&totals->field, 1, __ATOMIC_RELAXED)

static void open_totals(int fd)
{
	totals = mmap(NULL, sizeof(*totals), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (totals == MAP_FAILED)
		exit(2);
}

/* The answer, without its newline; NULL when there was none. */
static char *ask(long index, const char *tag, char *answer, size_t size)
{
	struct sockaddr_in to4 = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	struct sockaddr_in6 to6 = {.sin6_family = AF_INET6, .sin6_port = htons(PORT)};
	struct linger reset = {1, 0};
	struct timeval limit = {10, 0};
	int six = index % 4 == 3;
	int fd = socket(six ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	char text[160];
	ssize_t length = -1;

	to4.sin_addr.s_addr = htonl(0xc6336401 + index % 250);
	inet_pton(AF_INET6, "2001:db8:5::1", &to6.sin6_addr);
	to6.sin6_addr.s6_addr[15] = 1 + index % 250;
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	if (!connect(fd, six ? (void *)&to6 : (void *)&to4, six ? sizeof(to6) : sizeof(to4))) {
		snprintf(text, sizeof(text), "%d %s\n", getpid(), tag);
		if (send(fd, text, strlen(text), MSG_NOSIGNAL) > 0)
			length = recv(fd, answer, size - 1, 0);
	}
	close(fd);
	if (length <= 0)
		return NULL;
	answer[length] = 0;
	answer[strcspn(answer, "\n")] = 0;
	return answer;
}

static void client(long index, const char *tag)
{
	time_t limit = time(NULL) + PATIENCE_S;
	char answer[200], expected[160];

	snprintf(expected, sizeof(expected), "%d %s", getpid(), tag);
	while (!ask(index, tag, answer, sizeof(answer))) {
		ADD(lost);
		if (time(NULL) > limit) {
			strcpy(answer, "no answer at all");
			break;
		}
		usleep(2000 + index % 8 * 1000);
	}
	if (!strcmp(answer, expected)) {
		ADD(right);
	} else {
		if (!strcmp(answer, "T"))
			ADD(direct);
		else if (answer[0] >= '0' && answer[0] <= '9')
			ADD(wrong);
		else
			ADD(missing);
		snprintf(totals->what, sizeof(totals->what), "%.90s: %.90s", expected, answer);
	}
	ADD(done);
	_exit(0);
}

static void start(char **argv, long index, int fd)
{
	char numbers[2][32], tag[100];

	if (fork())
		return;
	ADD(forks);
	if (index % 2) {
		pid_t other = fork();

		if (!other)
			_exit(0);
		ADD(forks);
		waitpid(other, NULL, 0);
	}
	if (index % 32 == 7) {
		snprintf(tag, sizeof(tag), "%s-%ld", argv[1], index);
		snprintf(numbers[0], sizeof(numbers[0]), "%ld", index);
		snprintf(numbers[1], sizeof(numbers[1]), "%d", fd);
		execl("/proc/self/exe", "storm", tag, numbers[0], "-", numbers[1], NULL);
		_exit(2);
	}
	if (index % 16 == 5) {
		pid_t before = getpid();

		if (fork())
			_exit(0);
		ADD(forks);
		while (getppid() == before)
			usleep(100);
	}
	client(index, argv[1]);
}

static void end(int signal)
{
	ended = signal;
}

int main(int argc, char **argv)
{
	if (argc == 5) {
		open_totals(atoi(argv[4]));
		client(atol(argv[2]), argv[1]);
	}
	if (argc != 4)
		return 2;
	long count = atol(argv[2]), parallel = atol(argv[3]);
	int fd = memfd_create("totals", 0);

	if (fd < 0 || ftruncate(fd, sizeof(*totals)))
		return 2;
	open_totals(fd);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	signal(SIGTERM, end);
	for (long index = 0; index < count && !ended; index++) {
		start(argv, index, fd);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		while (index + 1 - __atomic_load_n(&totals->done, __ATOMIC_RELAXED) >= parallel)
			if (waitpid(-1, NULL, 0) < 0)
				usleep(1000);
	}
	while (waitpid(-1, NULL, 0) > 0)
		;
	printf("{\"done\": %ld, \"right\": %ld, \"wrong\": %ld, \"missing\": %ld, \"direct\": %ld, \"lost\": %ld, "
	       "\"forks\": %ld, \"what\": \"%s\"}\n",
	       totals->done, totals->right, totals->wrong, totals->missing, totals->direct, totals->lost,
	       totals->forks, totals->what);
	return 0;
}
