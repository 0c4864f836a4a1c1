/* A libnvidia-ml.so.1 that plays a script.
 *
 * In: the text file named by NVML_SCRIPT. Each line is a function's name and what it answers, call by call; the last
 * answer holds. A function without a line answers NVML_ERROR_NOT_SUPPORTED. Answers:
 *   1234        that value                    abc         that string
 *   !4          that error code               clock:P:T   a counter in mJ that runs at P mW, published every T ms
 *   work:Q      what scripted_work_mj() was given so far, published in steps of Q
 *   wave:A:B:T  A and B in turn, T ms each
 * Lookups of a GPU succeed for the keys in their line and no others. With -DOLD_DRIVER the newer functions are not in
 * the library at all.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int nvmlReturn_t;
typedef void *nvmlDevice_t;
typedef unsigned long long u64;

enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, MAX_LINES = 32, MAX_ANSWERS = 64 };

typedef struct {
    char *name;
    char *answers[MAX_ANSWERS];
    int count, next;
} Line;

static Line lines[MAX_LINES];
static int line_count = -1;
static u64 worked_mj;
static struct timespec begun;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void load(void) {
    char row[4096], *rest;
    FILE *file = fopen(getenv("NVML_SCRIPT"), "r");
    clock_gettime(CLOCK_MONOTONIC, &begun);
    line_count = 0;
    while (file && line_count < MAX_LINES && fgets(row, sizeof row, file)) {
        Line *line = &lines[line_count];
        char *word = strtok_r(row, " \n", &rest);
        if (!word) continue;
        line->name = strdup(word);
        while (line->count < MAX_ANSWERS && (word = strtok_r(NULL, " \n", &rest))) line->answers[line->count++] = strdup(word);
        line_count++;
    }
    if (file) fclose(file);
}

static Line *find(const char *name) {
    if (line_count < 0) load();
    for (int i = 0; i < line_count; i++)
        if (!strcmp(lines[i].name, name)) return &lines[i];
    return NULL;
}

static const char *next(const char *name) {
    const char *answer = NULL;
    pthread_mutex_lock(&lock);
    Line *line = find(name);
    if (line && line->count) {
        answer = line->answers[line->next];
        if (line->next < line->count - 1) line->next++;
    }
    pthread_mutex_unlock(&lock);
    return answer;
}

static u64 since_begun_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec - begun.tv_sec) * 1000LL + (now.tv_nsec - begun.tv_nsec) / 1000000LL;
}

static nvmlReturn_t number(const char *name, u64 *value) {
    const char *answer = next(name);
    u64 a, b, period;
    if (!answer) return NOT_SUPPORTED;
    if (*answer == '!') return atoi(answer + 1);
    if (sscanf(answer, "clock:%llu:%llu", &a, &period) == 2) *value = a * (since_begun_ms() / period * period) / 1000;
    else if (sscanf(answer, "work:%llu", &period) == 1) *value = worked_mj / period * period;
    else if (sscanf(answer, "wave:%llu:%llu:%llu", &a, &b, &period) == 3) *value = since_begun_ms() / period % 2 ? b : a;
    else *value = strtoull(answer, NULL, 0);
    return OK;
}

static nvmlReturn_t small(const char *name, unsigned *value) {
    u64 wide = 0;
    nvmlReturn_t code = number(name, &wide);
    if (code == OK) *value = (unsigned)wide;
    return code;
}

static nvmlReturn_t text(const char *name, char *out, unsigned size) {
    const char *answer = next(name);
    if (!answer) return NOT_SUPPORTED;
    if (*answer == '!') return atoi(answer + 1);
    snprintf(out, size, "%s", answer);
    return OK;
}

static nvmlReturn_t lookup(const char *name, const char *key, nvmlDevice_t *device) {
    Line *line = find(name);
    if (line && line->count && *line->answers[0] == '!') return atoi(line->answers[0] + 1);
    for (int i = 0; line && i < line->count; i++)
        if (!strcmp(line->answers[i], key)) {
            *device = line;
            return OK;
        }
    return NOT_FOUND;
}

void scripted_work_mj(unsigned millijoules) { worked_mj += millijoules; }

nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    const char *answer = next("nvmlInitWithFlags");
    return answer && *answer == '!' ? atoi(answer + 1) : OK;
}
nvmlReturn_t nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(nvmlReturn_t code) { return "scripted"; }

#define TEXT(name) nvmlReturn_t name(char *out, unsigned size) { return text(#name, out, size); }
#define LOOKUP(name) nvmlReturn_t name(const char *key, nvmlDevice_t *device) { return lookup(#name, key, device); }
#define SMALL(name) nvmlReturn_t name(nvmlDevice_t device, unsigned *value) { return small(#name, value); }
#define WIDE(name) nvmlReturn_t name(nvmlDevice_t device, u64 *value) { return number(#name, value); }
#define CHOSEN(name) nvmlReturn_t name(nvmlDevice_t device, int which, unsigned *value) { return small(#name, value); }

TEXT(nvmlSystemGetDriverVersion)
TEXT(nvmlSystemGetNVMLVersion)
LOOKUP(nvmlDeviceGetHandleByUUID)
LOOKUP(nvmlDeviceGetHandleByPciBusId_v2)
SMALL(nvmlDeviceGetPowerUsage)
SMALL(nvmlDeviceGetEnforcedPowerLimit)
SMALL(nvmlDeviceGetPerformanceState)
WIDE(nvmlDeviceGetTotalEnergyConsumption)
WIDE(nvmlDeviceGetCurrentClocksThrottleReasons)
CHOSEN(nvmlDeviceGetClockInfo)
CHOSEN(nvmlDeviceGetMaxClockInfo)
CHOSEN(nvmlDeviceGetTemperature)

nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t slice, nvmlDevice_t *device) {
    *device = slice;
    return OK;
}

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending) {
    *pending = 0;
    return small("nvmlDeviceGetMigMode", current);
}

#ifndef OLD_DRIVER
typedef struct {
    unsigned version;
    int sensor, temperature;
} Temperature;

nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, Temperature *asked) {
    return small("nvmlDeviceGetTemperatureV", (unsigned *)&asked->temperature);
}

WIDE(nvmlDeviceGetCurrentClocksEventReasons)
#endif
