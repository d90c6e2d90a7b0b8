// The limit a Python environment is measured against: mj_step in a plain C loop.
//
// N simulations are divided among threads. Each env step draws a random control, calls mj_step frame_skip times, tests
// the joint state against a box and the episode clock against its limit, and resets from uniform noise when either
// fails. No observation, no reward, no contact-force pass: what is left is the price of the physics.
//
// Built and called by envs.py through ctypes; the model comes from Python, so both sides simulate the same one.

#include <mujoco/mujoco.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

typedef struct {
  mjModel* model;
  mjData** data;
  int* clock;
  int num_envs, frame_skip, episode_len, num_threads;
  double noise;
  double *low, *high;  // box on qpos and qvel, nq + nv each
  double seconds;
  uint64_t* random;    // one generator per thread
  long* steps;         // env steps done by each thread
} Loop;

typedef struct {
  Loop* loop;
  int thread;
} Share;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Uniform on [0, 1), xorshift64.
static double uniform(uint64_t* s) {
  *s ^= *s << 13;
  *s ^= *s >> 7;
  *s ^= *s << 17;
  return (double)(*s >> 11) / 9007199254740992.0;
}

static void restart(const Loop* loop, int i, uint64_t* random) {
  const mjModel* m = loop->model;
  mjData* d = loop->data[i];
  mj_resetData(m, d);
  for (int k = 0; k < m->nq; k++) d->qpos[k] += loop->noise * (2 * uniform(random) - 1);
  for (int k = 0; k < m->nv; k++) d->qvel[k] += loop->noise * (2 * uniform(random) - 1);
  loop->clock[i] = 0;
}

static int healthy(const Loop* loop, const mjData* d) {
  const mjModel* m = loop->model;
  for (int k = 0; k < m->nq; k++) {
    if (!(d->qpos[k] > loop->low[k] && d->qpos[k] < loop->high[k])) return 0;
  }
  for (int k = 0; k < m->nv; k++) {
    if (!(d->qvel[k] > loop->low[m->nq + k] && d->qvel[k] < loop->high[m->nq + k])) return 0;
  }
  return 1;
}

static void* work(void* argument) {
  Share* share = argument;
  Loop* loop = share->loop;
  const mjModel* m = loop->model;
  const int first = loop->num_envs * share->thread / loop->num_threads;
  const int last = loop->num_envs * (share->thread + 1) / loop->num_threads;
  uint64_t random = loop->random[share->thread];
  const double start = now();
  long steps = 0;
  do {
    for (int i = first; i < last; i++) {
      mjData* d = loop->data[i];
      for (int k = 0; k < m->nu; k++) {
        const double low = m->actuator_ctrlrange[2 * k], high = m->actuator_ctrlrange[2 * k + 1];
        d->ctrl[k] = low + (high - low) * uniform(&random);
      }
      for (int k = 0; k < loop->frame_skip; k++) mj_step(m, d);
      steps++;
      if (++loop->clock[i] >= loop->episode_len || !healthy(loop, d)) restart(loop, i, &random);
    }
  } while (now() - start < loop->seconds);
  loop->random[share->thread] = random;
  loop->steps[share->thread] = steps;
  return NULL;
}

// Copy the model and make num_envs simulations. low, high: nq + nv bounds of the healthy box.
void* loop_make(const mjModel* model, int num_envs, int frame_skip, int episode_len, int num_threads, double noise,
                const double* low, const double* high) {
  Loop* loop = calloc(1, sizeof(Loop));
  loop->model = mj_copyModel(NULL, model);
  loop->num_envs = num_envs;
  loop->frame_skip = frame_skip;
  loop->episode_len = episode_len;
  loop->num_threads = num_threads;
  loop->noise = noise;
  const int size = model->nq + model->nv;
  loop->low = malloc(size * sizeof(double));
  loop->high = malloc(size * sizeof(double));
  for (int k = 0; k < size; k++) {
    loop->low[k] = low[k];
    loop->high[k] = high[k];
  }
  loop->random = malloc(num_threads * sizeof(uint64_t));
  loop->steps = calloc(num_threads, sizeof(long));
  for (int k = 0; k < num_threads; k++) loop->random[k] = 88172645463325252ULL + 7919ULL * k;
  loop->clock = calloc(num_envs, sizeof(int));
  loop->data = malloc(num_envs * sizeof(mjData*));
  for (int i = 0; i < num_envs; i++) {
    loop->data[i] = mj_makeData(loop->model);
    restart(loop, i, &loop->random[0]);
  }
  return loop;
}

// Run for about the given time; return env steps per second over all threads.
double loop_run(void* handle, double seconds) {
  Loop* loop = handle;
  loop->seconds = seconds;
  pthread_t* threads = malloc(loop->num_threads * sizeof(pthread_t));
  Share* shares = malloc(loop->num_threads * sizeof(Share));
  const double start = now();
  for (int k = 0; k < loop->num_threads; k++) {
    shares[k] = (Share){loop, k};
    if (k) pthread_create(&threads[k], NULL, work, &shares[k]);
  }
  work(&shares[0]);
  long steps = loop->steps[0];
  for (int k = 1; k < loop->num_threads; k++) {
    pthread_join(threads[k], NULL);
    steps += loop->steps[k];
  }
  const double rate = (double)steps / (now() - start);
  free(threads);
  free(shares);
  return rate;
}

void loop_free(void* handle) {
  Loop* loop = handle;
  for (int i = 0; i < loop->num_envs; i++) mj_deleteData(loop->data[i]);
  mj_deleteModel(loop->model);
  free(loop->data);
  free(loop->clock);
  free(loop->low);
  free(loop->high);
  free(loop->random);
  free(loop->steps);
  free(loop);
}
