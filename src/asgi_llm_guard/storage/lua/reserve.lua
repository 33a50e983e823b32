-- reserve: admit each request under all of its claims or none; of several plans the first that fits.
--
-- ARGV: clock, epoch, oldest heartbeat the client knows of, lapse, new shapes, then the requests: MessagePack arrays of
-- owner, number of plans, number of bundles, call ids, and for each plan its bundles as `take` reads them.
-- Reply: clock, epoch, then for each request
--   {1, plan, 5 numbers for each claim}       granted
--   {0, 5 numbers for each claim}             no plan fits
--   {2, which call id, reason}                a call id has ended
--   {3, plan, at, {holds}}                    granted before: the holds' fields
--   {4}                                       the owner, or one that may stand in the way, has lapsed: sweep, and ask again
--   {5}                                       a calendar window is over: work it out again, and ask again
--   {6}                                       a shape is not known: send it along
--   {7, which call id}                        some call ids are open and others are not
local epoch = call('GET', KEYS[1])
if not epoch or sub(epoch, 1, #ARGV[2]) ~= ARGV[2] or tonumber(string.match(epoch, ' (%d+) ')) < tonumber(ARGV[3]) then
  return {now, epoch or '', 'lost'}
end
learn_shapes(ARGV[5])
local lapse = tonumber(ARGV[4])

local requests, ids, hold_names, cell_names, n = {}, {}, {}, {}, 0
for r = 6, #ARGV do
  local f = cmsgpack.unpack(ARGV[r])
  local plans, bundles = f[2], f[3]
  for b = 1, bundles do
    ids[#ids + 1] = f[3 + b]
    hold_names[#ids] = HOLD .. f[3 + b]
  end
  local q, first, known = 4 + bundles, n + 1, true
  for _ = 1, plans * bundles do
    local shape = shape_of(f[q + 1])
    if not shape then
      known = false
      break
    end
    q = q + 2
    for i = 1, #shape, 5 do
      n = n + 1
      cell_names[n] = CELL .. shape[i + 4] .. f[q]
      local kind = shape[i]
      q = q + (kind == DISTINCT and 4 or kind == CALENDAR and 5 or 3) + (shape[i + 3] >= 8 and 1 or 0)
    end
  end
  requests[#requests + 1] = {f, first, known}
end
load_cells(cell_names)
local hold_values, settled = {}, {}
if #ids > 0 then -- plans without a bundle claim nothing, and fit
  hold_values, settled = call('MGET', unpack(hold_names)), call('HMGET', LEDGER_IDS, unpack(ids))
end
local known_holds, in_ledger = {}, {}
for i = 1, #ids do
  known_holds[ids[i]] = hold_values[i]
  in_ledger[ids[i]] = settled[i]
end

-- The answer for call ids of which at least one is known; nil: none is.
local function seen(f)
  local open, missing = 0, nil
  for b = 1, f[3] do
    local id = f[3 + b]
    local value = known_holds[id]
    local state = value and state_of(value)
    if state == 'O' then
      open = open + 1
    elseif state and now < cmsgpack.unpack(value)[2] then
      return {2, b, REASON[state]}
    elseif in_ledger[id] then
      return {2, b, 'settled'}
    else
      missing = missing or b
    end
  end
  if open == 0 then return nil end
  if missing then return {7, missing} end
  local holds, first = {}, nil
  for b = 1, f[3] do
    local h = cmsgpack.unpack(known_holds[f[3 + b]])
    first = first or h
    local shape = shape_of(h[6])
    if not shape then return {6} end
    local claims = claims_of(h, h[3], shape, 7)
    local flat = {h[6], h[3]}
    for i = 1, #claims do
      local c = claims[i]
      flat[#flat + 1] = {c.suffix, c.member or '', c.subject or '', c.amount, c.limit, c.taken, c.used, c.held, c.pin, c.resets or -1}
    end
    holds[b] = flat
  end
  return {3, first[4], first[3], holds}
end

local lapses = {}

local function lapse_of(owner)
  local score = lapses[owner]
  if score == nil then
    score = call('ZSCORE', OWNERS, owner)
    score = score and tonumber(score)
    lapses[owner] = score
  end
  return score
end

local any_lapsed

local function somebody_lapsed()
  if any_lapsed == nil then any_lapsed = #call('ZRANGEBYSCORE', OWNERS, '-inf', now, 'LIMIT', 0, 1) > 0 end
  return any_lapsed
end

local replies = {now, epoch}
local taken, register = {}, {}
for r = 1, #requests do
  local f, k, known = requests[r][1], requests[r][2], requests[r][3]
  local owner, plans, bundles = f[1], f[2], f[3]
  local reply
  if not known then
    reply = {6}
  else
    for b = 1, bundles do
      local id = f[3 + b]
      if known_holds[id] or in_ledger[id] then
        reply = seen(f)
        break
      end
    end
  end
  local score = not reply and lapse_of(owner)
  if score and score <= now then
    reply = {4}
  elseif not reply and not score and somebody_lapsed() and call('HEXISTS', LAPSED, owner) == 1 then
    reply = {4} -- it has lapsed itself: what it takes now must not be expired with what it held before
  end
  if not reply then
    local q, states = 4 + bundles, nil
    for plan = 1, plans do
      local fits, result, holds = take(f, q, bundles, cell_names, k, now, plan - 1)
      if fits == STALE then
        reply = {5}
        break
      elseif fits then
        for b = 1, bundles do
          holds[b][2] = written_owner(owner, f[3 + b])
          local value = pack_array(holds[b].n, holds[b])
          known_holds[f[3 + b]] = value
          taken[#taken + 1] = {f[3 + b], owner, value}
        end
        if not score then
          lapses[owner] = now + lapse
          register[owner] = now + lapse
        end
        reply = result
        break
      end
      states = states or {0}
      local m = #states
      for i = 3, #result do states[m + i - 2] = result[i] end
      for _ = 1, bundles do -- on to the next plan
        local shape = shapes[f[q + 1]]
        q = q + 2
        for i = 1, #shape, 5 do
          local kind = shape[i]
          q = q + (kind == DISTINCT and 4 or kind == CALENDAR and 5 or 3) + (shape[i + 3] >= 8 and 1 or 0)
          k = k + 1
        end
      end
    end
    if not reply then reply = somebody_lapsed() and {4} or states end
  end
  replies[r + 2] = reply
end

-- Everything is judged: write, the charges first.
save_cells()
for owner, score in pairs(register) do
  call('ZADD', OWNERS, score, owner)
  call('PEXPIRE', OWNERS, KEEP)
end
local touched = {}
for i = 1, #taken do
  local id, owner, value = taken[i][1], taken[i][2], taken[i][3]
  call('SET', HOLD .. id, value, 'PX', LONGEST)
  call('SADD', OPEN .. owner, id)
  touched[owner] = true
end
for owner in pairs(touched) do call('PEXPIRE', OPEN .. owner, LONGEST) end
return replies
