/* The part of AscendCL's runtime that torch-npu needs to start, over host memory: a device address is a host address,
 * streams run at once, events hold the time. Signatures are those of the public AscendCL reference; whatever is not here
 * is a function that returns zero (see __init__.py). Settings: VB_SOFT_NPU_COUNT cards, VB_SOFT_NPU_SOC their chip. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, NO_MEMORY = 207001, MOST = 16, ALIGNMENT = 512 };

struct block {
    size_t size;
    int card;
};

static _Thread_local int card;
static char contexts[MOST];
static size_t used[MOST];
static uintptr_t streams;

static size_t per_card(void) { return (size_t)4 << 30; }

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* cards */
int aclrtGetDeviceCount(uint32_t *count) {
    const char *set = getenv("VB_SOFT_NPU_COUNT");
    *count = set ? (uint32_t)atoi(set) : 2;
    return OK;
}
const char *aclrtGetSocName(void) {
    const char *set = getenv("VB_SOFT_NPU_SOC");
    return set ? set : "Ascend910B1";
}
const char *aclGetRecentErrMsg(void) { return "software AscendCL"; }
int aclrtSetDevice(int32_t wanted) {
    card = wanted;
    return OK;
}
int aclrtGetDevice(int32_t *current) {
    *current = card;
    return OK;
}
int aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logical) {
    *logical = user;
    return OK;
}
int aclrtGetPrimaryCtxState(int32_t wanted, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    if (active) *active = 1;
    return OK;
}
int aclrtGetCurrentContext(void **context) {
    *context = contexts + card;
    return OK;
}
int aclrtSetCurrentContext(void *context) {
    ptrdiff_t wanted = (char *)context - contexts;
    if (wanted >= 0 && wanted < MOST) card = (int)wanted;
    return OK;
}
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) {
    *can = 1;
    return OK;
}
int aclrtGetDeviceInfo(uint32_t wanted, int attribute, int64_t *value) {
    *value = 24;
    return OK;
}
int aclsysGetVersionStr(char *package, char *version) {
    strcpy(version, "9.1.0");
    return OK;
}

/* options of the operator compiler */
size_t aclGetCompileoptSize(int option) { return 16; }
int aclGetCompileopt(int option, char *value, size_t size) {
    if (value && size) {
        memset(value, 0, size);
        value[0] = '1';
    }
    return OK;
}

/* streams and events */
int aclrtCreateStream(void **stream) {
    *stream = (void *)++streams;
    return OK;
}
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return aclrtCreateStream(stream); }
int aclrtStreamQuery(void *stream, int *status) {
    *status = 0;
    return OK;
}
int aclrtStreamGetId(void *stream, int32_t *id) {
    *id = (int32_t)(uintptr_t)stream;
    return OK;
}
int aclrtCreateEventWithFlag(void **event, uint32_t flags) {
    *event = calloc(1, sizeof(uint64_t));
    return *event ? OK : NO_MEMORY;
}
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) { return aclrtCreateEventWithFlag(event, flags); }
int aclrtDestroyEvent(void *event) {
    free(event);
    return OK;
}
int aclrtRecordEvent(void *event, void *stream) {
    *(uint64_t *)event = now();
    return OK;
}
int aclrtQueryEventStatus(void *event, int *status) {
    *status = 1;
    return OK;
}
int aclrtQueryEventWaitStatus(void *event, int *status) {
    *status = 0;
    return OK;
}
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    *milliseconds = (float)(*(uint64_t *)end - *(uint64_t *)start) / 1e6f;
    return OK;
}

/* memory */
int aclrtMalloc(void **address, size_t size, int policy) {
    if (used[card] + size > per_card()) return NO_MEMORY;
    char *block = aligned_alloc(ALIGNMENT, (size / ALIGNMENT + 2) * ALIGNMENT);
    if (!block) return NO_MEMORY;
    *(struct block *)block = (struct block){size, card};
    used[card] += size;
    *address = block + ALIGNMENT;
    return OK;
}
int aclrtMallocAlign32(void **address, size_t size, int policy) { return aclrtMalloc(address, size, policy); }
int aclrtFree(void *address) {
    if (address) {
        struct block *block = (struct block *)((char *)address - ALIGNMENT);
        used[block->card] -= block->size;
        free(block);
    }
    return OK;
}
int aclrtMallocHost(void **address, size_t size) {
    *address = aligned_alloc(ALIGNMENT, (size / ALIGNMENT + 1) * ALIGNMENT);
    return *address ? OK : NO_MEMORY;
}
int aclrtFreeHost(void *address) {
    free(address);
    return OK;
}
int aclrtGetMemInfo(int attribute, size_t *left, size_t *total) {
    *total = per_card();
    *left = per_card() - used[card];
    return OK;
}
int aclrtMemcpy(void *target, size_t room, const void *source, size_t size, int kind) {
    memmove(target, source, size);
    return OK;
}
int aclrtMemcpyAsync(void *target, size_t room, const void *source, size_t size, int kind, void *stream) {
    return aclrtMemcpy(target, room, source, size, kind);
}
int aclrtMemset(void *target, size_t room, int32_t value, size_t size) {
    memset(target, value, size);
    return OK;
}
int aclrtMemsetAsync(void *target, size_t room, int32_t value, size_t size, void *stream) {
    return aclrtMemset(target, room, value, size);
}
