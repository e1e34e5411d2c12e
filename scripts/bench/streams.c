/* Reads many event streams at once and takes the time of every event.
 *
 *   cc -O2 -o streams streams.c
 *   BENCH_BODY=FILE BENCH_KEY=... [BENCH_HEADERS=...] [BENCH_TIER=...]
 *     streams HOST PORT PATH CONNECTIONS WARM_SECONDS SECONDS
 *
 * Every connection sends the request, reads the stream to its end, and sends it again. What happens
 * in the warm seconds is not counted. Printed is one line of JSON: streams that ended, events (and
 * every event, the warm seconds' too), the time to the first byte of the body, the time between two events of a stream (both in seconds),
 * streams that broke off, and events that did not name the tier of BENCH_TIER.
 *
 * wrk cannot do this: it takes the time of whole answers only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENT_BYTES = 65536, READ_BYTES = 262144, BUCKETS = 400000, BUCKET_US = 10 };

/* How far an answer has been read. */
enum state { HEAD, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER };

struct stream {
    int fd;
    enum state state;
    char *event;     /* of the event, or head, that is being read */
    size_t length;
    size_t chunk;    /* bytes left of the chunk */
    int digits;      /* of the chunk's size that were read */
    int done;        /* whether [DONE] has come */
    double sent, last;
};

struct histogram {
    unsigned *counts;
    unsigned long total;
};

static struct histogram gaps, firsts;
static unsigned long streams, events, every_event, broken, untrue_events;
static double counted_from;
static char *request, stamp[128];
static size_t request_length;
static struct sockaddr_in address;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void count(struct histogram *h, double seconds) {
    long bucket = seconds * 1e6 / BUCKET_US;
    h->counts[bucket < 0 ? 0 : bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    h->total++;
}

static double percentile(const struct histogram *h, double share) {
    unsigned long seen = 0, wanted = share * h->total;
    for (long bucket = 0; bucket < BUCKETS; bucket++)
        if ((seen += h->counts[bucket]) > wanted) return (bucket + 0.5) * BUCKET_US * 1e-6;
    return 0;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

/* Connect, which on loopback does not take long, and send the request. */
static void start(struct stream *s, int epoll) {
    int yes = 1;
    if (s->fd < 0) {
        s->fd = socket(AF_INET, SOCK_STREAM, 0);
        if (s->fd < 0 || connect(s->fd, (struct sockaddr *)&address, sizeof address)) die("connect");
        setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        fcntl(s->fd, F_SETFL, O_NONBLOCK);
        struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = s};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, s->fd, &wanted)) die("epoll_ctl");
    }
    s->state = HEAD;
    s->length = s->chunk = s->digits = s->done = 0;
    s->last = 0;
    s->sent = now();
    for (size_t sent = 0; sent < request_length;) {
        ssize_t n = write(s->fd, request + sent, request_length - sent);
        if (n > 0) sent += n;
        else if (n < 0 && errno == EAGAIN) usleep(100);
        else return; /* reading will tell */
    }
}

static void end_event(struct stream *s, double at) {
    int is_done = s->length >= 12 && !memcmp(s->event, "data: [DONE]", 12);
    int is_data = s->length >= 5 && !memcmp(s->event, "data:", 5);
    if (!is_data) return;
    s->done |= is_done;
    every_event++;
    if (at >= counted_from) {
        events++;
        if (s->last) count(&gaps, at - s->last);
        if (*stamp && !is_done && !memmem(s->event, s->length, stamp, strlen(stamp)))
            untrue_events++;
    }
    s->last = at;
}

static void take_body(struct stream *s, const char *data, size_t length, double at) {
    while (length) {
        const char *line = memchr(data, '\n', length);
        size_t piece = line ? (size_t)(line - data) + 1 : length;
        if (s->length + piece > EVENT_BYTES) s->length = 0;
        memcpy(s->event + s->length, data, piece);
        s->length += piece;
        data += piece;
        length -= piece;
        int ends = s->length >= 2 && s->event[s->length - 1] == '\n' &&
                   (s->event[s->length - 2] == '\n' ||
                    (s->length >= 4 && !memcmp(s->event + s->length - 4, "\r\n\r\n", 4)));
        if (ends) {
            end_event(s, at);
            s->length = 0;
        }
    }
}

/* Take what was read; whether the answer has ended. -1: it is none that can be read. */
static int take(struct stream *s, const char *data, size_t length, double at) {
    for (size_t i = 0; i < length;) {
        char c = data[i];
        switch (s->state) {
        case HEAD:
            if (s->length == EVENT_BYTES) return -1;
            s->event[s->length++] = c;
            i++;
            if (s->length >= 4 && !memcmp(s->event + s->length - 4, "\r\n\r\n", 4)) {
                s->event[s->length - 1] = 0;
                if (memcmp(s->event + 8, " 200", 4) || !strcasestr(s->event, "chunked")) {
                    fprintf(stderr, "streams: %.300s\n", s->event);
                    return -1;
                }
                s->state = CHUNK_SIZE;
                s->length = 0;
            }
            break;
        case CHUNK_SIZE:
            i++;
            if (c == '\n') {
                s->digits = -1;
                s->state = s->chunk ? CHUNK_DATA : TRAILER;
                s->length = s->chunk ? s->length : 0;
            } else if (s->digits >= 0) {
                char hex[2] = {c, 0}, *end;
                unsigned long digit = strtoul(hex, &end, 16);
                if (*end) s->digits = -1; /* CR, or an extension */
                else s->chunk = s->chunk * 16 + digit;
            }
            break;
        case CHUNK_DATA: {
            size_t piece = length - i < s->chunk ? length - i : s->chunk;
            if (s->sent) {
                if (s->sent >= counted_from) count(&firsts, at - s->sent);
                s->sent = 0;
            }
            take_body(s, data + i, piece, at);
            i += piece;
            s->chunk -= piece;
            if (!s->chunk) s->state = CHUNK_END;
            break;
        }
        case CHUNK_END:
            i++;
            if (c == '\n') {
                s->state = CHUNK_SIZE;
                s->digits = 0;
            }
            break;
        case TRAILER: /* an empty line ends the answer */
            i++;
            if (c == '\n') {
                if (s->length == 0) return 1;
                s->length = 0;
            } else if (c != '\r') {
                s->length++;
            }
            break;
        }
    }
    return 0;
}

/* The text of a file: a long body is too long for the environment. */
static char *text_of(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) die(path);
    char *text = NULL;
    size_t length = 0;
    if (getdelim(&text, &length, 0, file) < 0) die(path);
    fclose(file);
    return text;
}

static void make_request(char **arguments) {
    const char *body = text_of(getenv("BENCH_BODY")), *key = getenv("BENCH_KEY"), *tier = getenv("BENCH_TIER");
    const char *given = getenv("BENCH_HEADERS");
    char *extra = calloc(1, 2 * strlen(given ? given : "") + 3), *to = extra;
    for (const char *c = given ? given : ""; *c; c++) {
        if (*c == '\n') *to++ = '\r';
        *to++ = *c;
    }
    if (to != extra) strcpy(to, "\r\n");
    int n = asprintf(&request,
                     "POST %s HTTP/1.1\r\nHost: %s:%s\r\nContent-Type: application/json\r\n"
                     "Authorization: Bearer %s\r\n%sContent-Length: %zu\r\n\r\n%s",
                     arguments[3], arguments[1], arguments[2], key, extra, strlen(body), body);
    if (n < 0) die("asprintf");
    request_length = n;
    if (tier) snprintf(stamp, sizeof stamp, "\"service_tier\":\"%s\"", tier);
}

static int read_one(struct stream *s, char *buffer, double ends, int epoll) {
    ssize_t n = read(s->fd, buffer, READ_BYTES);
    double at = now();
    if (n < 0 && errno == EAGAIN) return 1;
    int ended = n > 0 ? take(s, buffer, n, at) : -1;
    if (ended == 0) return 1;
    if (at >= counted_from) {
        if (ended > 0 && s->done) streams++;
        else broken++;
    }
    if (ended < 0) {
        close(s->fd);
        s->fd = -1;
        usleep(1000);
    }
    if (at >= ends) return 0;
    start(s, epoll);
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 7) return fprintf(stderr, "usage: see the source\n"), 2;
    int connections = atoi(argv[4]), epoll = epoll_create1(0);
    address.sin_family = AF_INET;
    address.sin_port = htons(atoi(argv[2]));
    inet_pton(AF_INET, argv[1], &address.sin_addr);
    gaps.counts = calloc(BUCKETS, sizeof(unsigned));
    firsts.counts = calloc(BUCKETS, sizeof(unsigned));
    make_request(argv);

    counted_from = now() + atof(argv[5]);
    double ends = counted_from + atof(argv[6]);
    struct stream *all = calloc(connections, sizeof *all);
    for (int i = 0; i < connections; i++) {
        all[i].fd = -1;
        all[i].event = malloc(EVENT_BYTES);
        start(&all[i], epoll);
    }
    char *buffer = malloc(READ_BYTES);
    struct epoll_event ready[512];
    while (now() < ends) {
        int n = epoll_wait(epoll, ready, 512, 50);
        for (int i = 0; i < n; i++) read_one(ready[i].data.ptr, buffer, ends, epoll);
    }
    printf("{\"streams\":%lu,\"events\":%lu,\"every_event\":%lu,\"seconds\":%.6f,\"first_p50_s\":%.6f,"
           "\"first_p99_s\":%.6f,\"gap_p50_s\":%.6f,\"gap_p99_s\":%.6f,\"gap_max_s\":%.6f,"
           "\"broken\":%lu,\"untrue\":%lu}\n",
           streams, events, every_event, now() - counted_from, percentile(&firsts, 0.5),
           percentile(&firsts, 0.99), percentile(&gaps, 0.5), percentile(&gaps, 0.99),
           percentile(&gaps, 1 - 1e-9), broken, untrue_events);
    return 0;
}
