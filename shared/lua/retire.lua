-- A worker leaves in good order: it runs nothing any more, so what it holds and has ended is free.
-- KEYS[1] the workers
-- ARGV: 1 prefix, 2 worker id
-- Returns 1, or 0 if it still holds unfinished jobs: then its lease ends now, and the next sweep recovers them.

even_without_memory()
for _, id in ipairs(redis.call('SMEMBERS', worker_jobs_key(ARGV[2]))) do
  local job = look_up(id)
  if not job.status or is_terminal(job.status) then
    release(id, job, now_ms())
    redis.call('SREM', worker_jobs_key(ARGV[2]), id)
  end
end
if redis.call('SCARD', worker_jobs_key(ARGV[2])) > 0 then
  redis.call('ZADD', KEYS[1], 0, ARGV[2])
  return 0
end
redis.call('ZREM', KEYS[1], ARGV[2])
redis.call('DEL', worker_key(ARGV[2]), worker_jobs_key(ARGV[2]))
return 1
